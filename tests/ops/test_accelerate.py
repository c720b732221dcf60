"""The operator in tiny random models of Hugging Face transformers: same outputs and gradients, and no trace after
undo."""

import copy
import os
import pickle
import types
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from attention_inputs import relative_error
from torch import Tensor, nn

from ddetr.ops import accelerate

tf = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(  # transformers' own
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.meshgrid"
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
OUTPUTS = {"logits", "pred_boxes", "decoder_coord_logits", "decoder_class_logits"}
OUTPUTS |= {"class_queries_logits", "masks_queries_logits"}
DETR = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 2}
DETR |= {"num_queries": 7, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
RT_DETR = DETR | {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32]}
RT_DETR |= {"num_denoising": 0, "freeze_backbone_batch_norms": False}
LW_DETR = {"d_model": 32, "decoder_ffn_dim": 32, "decoder_layers": 2, "num_queries": 7, "group_detr": 2}
LW_DETR |= {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
MASKS = {"hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 2, "num_queries": 7}
MASKS |= {"decoder_layers": 2, "num_attention_heads": 4}
NO_TIMM = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}


def resnet(kind: str = "ResNetConfig") -> object:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}
    return getattr(tf, kind)(**sizes, layer_type="basic", out_features=STAGES[1:])


def hgnet(stages: list[str] = STAGES[1:]) -> object:
    sizes = {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 24], "stage_mid_channels": [8] * 4}
    sizes |= {"stage_out_channels": [8, 16, 24, 32], "hidden_sizes": [8, 16, 24, 32]}
    return tf.HGNetV2Config(**sizes, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, out_features=stages)


def swin(stages: list[str] = STAGES[1:]) -> object:
    sizes = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    return tf.SwinConfig(**sizes, drop_path_rate=0.0, out_features=stages)


def bert() -> object:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.BertConfig(**sizes, intermediate_size=32)


def deformable_detr(**options: object) -> nn.Module:
    backbone = NO_TIMM | {"backbone_config": resnet()}
    return tf.DeformableDetrForObjectDetection(tf.DeformableDetrConfig(**DETR | backbone | options))


def lw_detr() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "window_block_indices": [0]}
    backbone = tf.LwDetrViTConfig(**sizes, image_size=64, pretrain_image_size=64, num_windows=4, out_indices=[0, 1])
    config = tf.LwDetrConfig(**LW_DETR, backbone_config=backbone, projector_scale_factors=[2.0, 0.5])
    return tf.LwDetrForObjectDetection(config)


def rf_detr() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_windows": 2}
    backbone = tf.RfDetrDinov2Config(**sizes, image_size=64, patch_size=16, out_indices=[1, 2])
    return tf.RfDetrForObjectDetection(tf.RfDetrConfig(**LW_DETR, backbone_config=backbone, intermediate_size=32))


def omdet_turbo() -> nn.Module:
    clip = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 48}
    clip |= {"intermediate_size": 32, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
    sizes = {"text_projection_in_dim": 48, "text_projection_out_dim": 48, "task_encoder_hidden_dim": 32}
    sizes |= {"class_embed_dim": 48, "encoder_hidden_dim": 32, "vision_features_channels": [32] * 3, "num_queries": 7}
    sizes |= {"encoder_in_channels": [16, 32, 64], "encoder_attention_heads": 4, "encoder_dim_feedforward": 32}
    sizes |= {"decoder_hidden_dim": 32, "decoder_num_heads": 4, "decoder_num_layers": 2, "decoder_dim_feedforward": 32}
    backbone = NO_TIMM | {"backbone_config": swin()}
    backbone |= {"apply_layernorm_after_vision_backbone": False, "image_size": 64}
    return tf.OmDetTurboForObjectDetection(
        tf.OmDetTurboConfig(**sizes, **backbone, text_config=tf.CLIPTextConfig(**clip))
    )


def mask2former() -> nn.Module:
    config = tf.Mask2FormerConfig(**MASKS, backbone_config=swin(STAGES), feature_size=32, mask_feature_size=32)
    return tf.Mask2FormerForUniversalSegmentation(config)


def oneformer() -> nn.Module:
    sizes = {"conv_dim": 32, "mask_dim": 32, "task_seq_len": 8, "query_dec_layers": 1}
    return tf.OneFormerForUniversalSegmentation(tf.OneFormerConfig(**MASKS, **sizes, backbone_config=swin(STAGES)))


def pp_doclayout_v2() -> nn.Module:
    order = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    order |= {"coordinate_size": 6, "shape_size": 4, "num_classes": 2}
    classes = {"class_thresholds": [0.5, 0.5], "class_order": [0, 1], "num_labels": 2}
    config = tf.PPDocLayoutV2Config(**RT_DETR, **classes, backbone_config=hgnet(), reading_order_config=order)
    return tf.PPDocLayoutV2ForObjectDetection(config)


def pp_doclayout_v3() -> nn.Module:
    sizes = {"mask_feature_channels": [8, 8], "num_prototypes": 4, "x4_feat_dim": 8}
    return tf.PPDocLayoutV3ForObjectDetection(tf.PPDocLayoutV3Config(**RT_DETR, **sizes, backbone_config=hgnet(STAGES)))


def of(name: str, *, head: str = "ForObjectDetection", **options: Callable | object) -> Callable[..., nn.Module]:
    """Builds the model of this name; options that are functions are called."""

    def build(**more: object) -> nn.Module:
        arguments = {key: value() if callable(value) else value for key, value in options.items()} | more
        return getattr(tf, name + head)(getattr(tf, name + "Config")(**arguments))

    return build


DINO = {"backbone_config": swin, "text_config": bert, "max_text_len": 8}
POINTS = {"backbone_config": hgnet, "decoder_n_points": [3, 6, 3]}  # as the published D-FINE models
d_fine = of("DFine", **RT_DETR, **POINTS)
rt_detr_v2 = of("RTDetrV2", **RT_DETR, backbone_config=lambda: resnet("RTDetrResNetConfig"))
# Name of the class in transformers -> builder, number of modules, what is swapped.
FAMILIES = {
    "DeformableDetr": (deformable_detr, 3, "step"),
    "RTDetr": (of("RTDetr", **RT_DETR, backbone_config=lambda: resnet("RTDetrResNetConfig")), 2, "step"),
    "RTDetrV2": (rt_detr_v2, 2, "step"),
    "DFine": (d_fine, 2, "sampling"),
    "Deimv2": (of("Deimv2", **RT_DETR, **POINTS), 2, "sampling"),
    "LwDetr": (lw_detr, 2, "step"),
    "RfDetr": (rf_detr, 2, "step"),
    "GroundingDino": (of("GroundingDino", **DETR, **DINO), 3, "step"),
    "MMGroundingDino": (of("MMGroundingDino", **DETR, **DINO), 3, "step"),
    "OmDetTurbo": (omdet_turbo, 2, "step"),
    "Mask2Former": (mask2former, 2, "step"),
    "OneFormer": (oneformer, 2, "step"),
    "PPDocLayoutV2": (pp_doclayout_v2, 2, "step"),
    "PPDocLayoutV3": (pp_doclayout_v3, 2, "step"),
    "PPDocLayoutV4": (of("PPDocLayoutV4", **RT_DETR, backbone_config=hgnet, hidden_size=32), 2, "step"),
}


def tiny(build: Callable[..., nn.Module], **options: object) -> nn.Module:
    """With every weight at random: many of those of attention are zero at first."""
    torch.manual_seed(0)
    model = build(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs, words = {"pixel_values": torch.rand(2, 3, 64, 64)}, torch.tensor([[1, 5, 6, 2]])
    name = type(model).__name__
    if "Dino" in name:
        inputs["input_ids"] = words.repeat(2, 1)
    if "OmDet" in name:
        inputs |= {"classes_input_ids": words.repeat(4, 1), "classes_attention_mask": torch.ones(4, 4).long()}
        inputs |= {"tasks_input_ids": words.repeat(2, 1), "tasks_attention_mask": torch.ones(2, 4).long()}
        inputs["classes_structure"] = torch.tensor([2, 2])
    if "OneFormer" in name:
        inputs["task_inputs"] = torch.randint(0, 9, (2, 8))
    if "DeformableDetr" in name:
        inputs["pixel_mask"] = torch.ones(2, 64, 64).long()
        inputs["pixel_mask"][1, 40:] = 0
    return inputs


def run(model: nn.Module, **options: bool) -> dict[str, Tensor]:
    """The outputs that count; -inf stands for words that are none."""
    torch.manual_seed(2)  # dropout
    inputs = inputs_of(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    outputs = model(**inputs, **options)
    for name in {"language_cache_class", "language_cache_prompt"} & set(model.__dict__):
        getattr(model, name).cache.clear()  # OmDet-Turbo's: graphs of embeddings, which can't be copied
    return {name: outputs[name].nan_to_num(0, 0, 0) for name in outputs if name in OUTPUTS}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """In training mode and float64, of a copy, which keeps what is swapped."""
    copied = copy.deepcopy(model).train().double()
    outputs = run(copied)
    sum(output.square().mean() for output in outputs.values()).backward()
    return {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    if not hasattr(tf, f"{family}Config"):
        pytest.skip(f"transformers {tf.__version__} has no {family}")
    if family == "OmDetTurbo" and tf.__version__ < "5":
        pytest.skip("before transformers 5 its text model does not work in float64")
    build, number, what = FAMILIES[family]
    model = tiny(build)
    expected, expected_grads, before, keys = run(model), gradients(model), attributes(model), set(model.state_dict())
    handle = accelerate(model)
    assert len(handle) == number
    assert set(handle.swapped.values()) == {what}
    assert handle.skipped == {}
    assert set(model.state_dict()) == keys
    got = run(model)
    assert len(got) == len(expected) == 2
    for name, output in got.items():
        assert relative_error(output.detach(), expected[name].detach()) < 1e-5, name
    grads = gradients(model)
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    assert grads.keys() == expected_grads.keys()
    assert any("sampling_offsets" in name for name in grads)
    for name, grad in grads.items():  # some are zero but for rounding
        scale = max(expected_grads[name].abs().max().item(), 1e-6 * largest)
        assert (grad - expected_grads[name]).abs().max().item() < 1e-6 * scale, name
    handle.undo()
    assert len(handle) == 0
    assert attributes(model) == before
    assert all(torch.equal(output, expected[name]) for name, output in run(model).items())


@pytest.fixture
def model() -> nn.Module:
    return tiny(deformable_detr)


ATTENTION = "model.encoder.layers.0.self_attn"


def attention_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor | list[tuple[int, int]]]:
    """Of one attention module with the four levels of `deformable_detr`."""
    shapes = [(6, 5), (3, 3), (2, 3), (1, 1)]
    cells = sum(h * w for h, w in shapes)
    torch.manual_seed(3)
    inputs = {"hidden_states": torch.randn(2, cells, 32).to(dtype), "reference_points": torch.rand(2, cells, 4, 2)}
    inputs |= {"encoder_hidden_states": torch.randn(2, cells, 32).to(dtype), "spatial_shapes": torch.tensor(shapes)}
    inputs["attention_mask"] = torch.arange(2 * cells).view(2, cells) % 5 > 0
    return inputs | {"spatial_shapes_list": shapes, "level_start_index": torch.tensor([0, 30, 39, 45])}


def test_returned_attention_weights(model: nn.Module) -> None:
    names = ("encoder_attentions", "cross_attentions")
    expected = model(**inputs_of(model), output_attentions=True)
    with accelerate(model):
        got = model(**inputs_of(model), output_attentions=True)
    for name in names:
        assert len(got[name]) == len(expected[name]) > 0
        for a, b in zip(got[name], expected[name]):
            torch.testing.assert_close(a, b)


def test_what_the_handle_says(model: nn.Module) -> None:
    handle = accelerate(model)
    decoder = {f"model.decoder.layers.{layer}.encoder_attn" for layer in (0, 1)}
    assert set(handle.swapped) == {ATTENTION} | decoder
    assert repr(handle).startswith(f"3 modules swapped\n  {ATTENTION}: step")


def test_twice_is_harmless(model: nn.Module) -> None:
    before = attributes(model)
    with accelerate(model) as outer:
        now = {name: module.forward for name, module in model.named_modules()}
        with accelerate(model) as inner:
            assert (len(outer), len(inner)) == (3, 0)
        assert {name: module.forward for name, module in model.named_modules()} == now
    assert attributes(model) == before
    outer.undo()
    assert attributes(model) == before


def test_goes_back_after_an_error(model: nn.Module) -> None:
    before = attributes(model)
    with pytest.raises(ValueError, match="channel dimension"), accelerate(model):
        model(torch.rand(1, 4, 64, 64))
    assert attributes(model) == before


def test_other_models_are_untouched(model: nn.Module) -> None:
    other, before = tiny(deformable_detr), attributes(model)
    own = type(model.get_submodule(ATTENTION)).forward
    accelerate(model)
    assert attributes(other) == before
    assert type(model.get_submodule(ATTENTION)).forward is own
    assert len(accelerate(other)) == 3


@pytest.mark.parametrize("build", [deformable_detr, d_fine])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(build: Callable, duplicate: Callable) -> None:
    model = tiny(build)
    expected = run(model)
    handle = accelerate(model)
    copied = duplicate(model)
    handle.undo()
    assert len(accelerate(copied)) == 0  # it came with the swap
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, output in run(copied).items():
        assert relative_error(output.detach(), expected[name].detach()) < 1e-5


def test_nothing_to_swap() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to accelerate in Sequential: expected .* call ddetr.ops.ms_deform_"):
        accelerate(model)


@pytest.mark.parametrize(("build", "message"), [(d_fine, "method is 'discrete'"), (rt_detr_v2, "output differs from")])
def test_sampling_without_interpolation_is_left(build: Callable, message: str) -> None:
    model = tiny(build, decoder_method="discrete")
    before = attributes(model)
    with pytest.raises(ValueError, match=f"'model.decoder.layers.1.encoder_attn' was left as it is: .*{message}"):
        accelerate(model)
    assert attributes(model) == before


def test_only_the_sampling_of_an_attention_that_differs(model: nn.Module) -> None:
    attention = model.get_submodule(ATTENTION)

    class Halved(type(attention)):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **others):
            output, weights = super().forward(hidden_states, attention_mask, **others)
            return output / 2, weights

    attention.__class__ = Halved
    expected, before = run(model), attributes(model)
    handle = accelerate(model)
    assert handle.swapped[ATTENTION + ".attn"] == "sampling"
    assert len(handle) == 3
    for name, output in run(model).items():
        assert relative_error(output.detach(), expected[name].detach()) < 1e-5
    assert len(accelerate(copy.deepcopy(model))) == 0
    handle.undo()
    assert attributes(model) == before


def test_a_forward_that_somebody_replaced_stays(model: nn.Module) -> None:
    attention = model.get_submodule(ATTENTION)
    calls = []

    def forward(self, *args, **kwargs):
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    attention.forward = replaced = types.MethodType(forward, attention)
    handle = accelerate(model)
    assert handle.swapped[ATTENTION + ".attn"] == "sampling"
    run(model)
    assert calls == [attention]
    decoder = model.model.decoder.layers[0].encoder_attn
    decoder.forward = later = types.MethodType(forward, decoder)
    handle.undo()
    assert attention.forward is replaced
    assert decoder.forward is later
    assert "forward" not in model.model.decoder.layers[1].encoder_attn.__dict__


@pytest.mark.parametrize("given", ["spatial_shapes", "spatial_shapes_list"])
def test_shapes_as_a_tensor_or_a_list(model: nn.Module, given: str) -> None:
    attention, inputs = model.get_submodule(ATTENTION), attention_inputs()
    expected, _ = attention(**inputs)
    accelerate(attention)
    inputs = {name: value for name, value in inputs.items() if name == given or not name.startswith("spatial_")}
    torch.testing.assert_close(attention(**inputs)[0], expected)


def test_a_list_of_shapes_is_never_read_from_the_device(model: nn.Module) -> None:
    attention, inputs = model.get_submodule(ATTENTION), attention_inputs()
    accelerate(attention)
    inputs["spatial_shapes"] = torch.empty(4, 2, device="meta")  # reading it would raise
    attention(**inputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(model: nn.Module, autocast: bool) -> None:
    attention = model.get_submodule(ATTENTION)
    truth, _ = attention.double()(**attention_inputs(torch.float64))
    attention.to(torch.float32 if autocast else torch.bfloat16)
    inputs = attention_inputs(torch.float32 if autocast else torch.bfloat16)
    assert accelerate(attention).swapped == {"": "step"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, weights = attention(**inputs)
    assert output.dtype == torch.bfloat16
    assert relative_error(output.detach(), truth.detach()) < 2e-2
    assert weights.shape == (2, 46, 4, 4, 4)


def test_compile_without_graph_break(model: nn.Module) -> None:
    torch._dynamo.reset()
    attention, inputs = model.get_submodule(ATTENTION), attention_inputs()
    accelerate(attention)
    expected, _ = attention(**inputs)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs)[0], expected)


def test_levels_with_different_numbers_of_points() -> None:
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2

    attention = tiny(d_fine).model.decoder.layers[0].encoder_attn
    assert accelerate(attention).swapped == {"": "sampling"}
    torch.manual_seed(4)
    shapes, points = [(6, 5), (3, 3), (2, 3)], [3, 6, 1]
    locations = (torch.randn(2, 5, 4, 10, 2, dtype=torch.float64) * 0.6 + 0.5).requires_grad_()
    tensors = [torch.randn(2, 45, 4, 8).double().requires_grad_(), locations, torch.rand(2, 5, 4, 10).double()]
    tensors[2].requires_grad_()
    expected = multi_scale_deformable_attention_v2(tensors[0], shapes, *tensors[1:], points)
    got = attention.ms_deformable_attn_core(tensors[0], shapes, *tensors[1:], points)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad)):
        torch.testing.assert_close(a, b)
