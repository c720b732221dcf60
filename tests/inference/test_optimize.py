"""Optimized models: the same outputs within the stated tolerance, the original untouched."""

import ctypes
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ddetr.checkpoint import Checkpoint, save_checkpoint
from ddetr.cli.main import main
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.inference import optimize
from ddetr.inference.optimize import OneDNNLinear, fold_batch_norms, optimize_model
from ddetr.inference.predictor import Predictor
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime import precision
from ddetr.runtime.allocator import keep_freed_memory
from ddetr.runtime.precision import onednn_matmuls

SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 2,
    "dec_layers": 2,
    "dim_feedforward": 96,
    "num_queries": 12,
    "num_classes": 3,
}


def make_model(**config: Any) -> DeformableDETR:
    """With batch norms that do something and heads that tell queries apart."""
    torch.manual_seed(0)
    model = DeformableDETR(**SMALL | config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("sampling_offsets.weight"):
                tensor.normal_(0, 0.05)
    return model


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def linears(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both answers to "is oneDNN faster here?"."""
    monkeypatch.setattr(optimize, "_onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"freeze_backbone": "stem"},
        {"with_box_refine": True, "two_stage": True},
        {"num_feature_levels": 1, "dilation": True},
        {"backbone": "regnetx_002"},
    ],
    ids=["trainable norms", "frozen norms", "two-stage", "dc5", "norms with activations inside"],
)
def test_float32_changes_only_rounding(config: dict[str, Any], linears: bool) -> None:
    model = make_model(**config)
    fast = optimize_model(model)
    assert any(isinstance(module, OneDNNLinear) for module in fast.modules()) == linears
    assert not any(hasattr(module, "running_var") for module in fast.modules()), "every batch norm is folded"
    images = torch.randn(2, 3, 150, 130)
    mask = torch.zeros(2, 150, 130, dtype=torch.bool)
    mask[1, 100:] = True
    for arguments in ((images[:1], None), (images, mask)):
        with torch.no_grad():
            expected, got = model(*arguments), fast(*arguments)
        torch.testing.assert_close(got["pred_logits"], expected["pred_logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got["pred_boxes"], expected["pred_boxes"], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near() -> None:
    model = make_model()
    fast = optimize_model(model, "bfloat16")
    images = torch.randn(1, 3, 150, 130)
    with torch.no_grad():
        expected, got = model(images), fast(images)
    difference = (got["pred_logits"].float() - expected["pred_logits"]).abs().max()
    assert 0 < difference < 0.05 * expected["pred_logits"].abs().max()
    assert got["pred_boxes"].dtype == torch.float32


def test_chunks_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    use_chunks = optimize.use_chunks
    monkeypatch.setattr(optimize, "use_chunks", lambda module, rows: use_chunks(module, 50))
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(
            optimize_model(model)(images)["pred_logits"], model(images)["pred_logits"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_compiled() -> None:
    model = make_model()
    fast = optimize_model(model, "compile")
    images = torch.randn(1, 3, 150, 130)
    with torch.no_grad():
        expected, got = model(images)["pred_logits"], fast(images)["pred_logits"]
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_original_is_not_touched() -> None:
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize_model(model)
    assert model.training
    assert all(p.requires_grad for name, p in model.named_parameters())
    assert [name for name, _ in model.named_modules() if name.endswith("bn1")]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_wrong_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(module: nn.Module, rows: int) -> None:
        with torch.no_grad():
            next(p for name, p in module.named_parameters() if name.endswith("value_proj.weight")).mul_(1.5)

    monkeypatch.setattr(optimize, "use_chunks", spoil)
    with pytest.raises(RuntimeError, match="moved by .* of its largest value, more than 1e-04: use the model as it is"):
        optimize_model(make_model())


def test_layers_that_run_twice_are_left() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.first, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.shared = nn.Conv2d(4, 4, 1)
            self.after_shared = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.convolution(x)
            y = self.first(y) + self.second(y)
            return self.after_shared(self.shared(y)) + self.shared(y)

    module = Twice().eval()
    with torch.no_grad():
        assert fold_batch_norms(module, torch.randn(1, 3, 5, 5)) == 0


def test_unknown_optimization() -> None:
    with pytest.raises(InputError, match="expected one of float32, bfloat16, compile, got 'fp8'"):
        optimize_model(make_model(), "fp8")


CATEGORIES = (Category(1, "a"), Category(2, "b"), Category(3, "c"))


def test_predictor_and_command_find_the_same(tmp_path, linears: bool, capsys: pytest.CaptureFixture) -> None:
    model = make_model()
    Image.effect_noise((120, 90), 90).convert("RGB").save(tmp_path / "image.png")
    plain = Predictor(model, CATEGORIES, image_size=128, threshold=0.0, device="cpu")
    for option in (True, "float32"):
        fast = Predictor(model, CATEGORIES, image_size=128, threshold=0.0, device="cpu", optimize=option)
        assert isinstance(fast.model, optimize.OptimizedModel)
        expected, got = plain.predict(tmp_path / "image.png"), fast.predict(tmp_path / "image.png")
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.boxes_xyxy, expected.boxes_xyxy, rtol=1e-3, atol=1e-2)
    size = {"image_size": 128, "max_size": 200}
    save_checkpoint(tmp_path / "model.pth", Checkpoint(model.state_dict(), model.config, CATEGORIES, size))
    arguments = ["predict", "--checkpoint", str(tmp_path / "model.pth"), "--output", str(tmp_path / "found")]
    assert main([*arguments, "--optimize", str(tmp_path / "image.png"), "--threshold", "0"]) == 0
    assert "objects in 1 images" in capsys.readouterr().out
    assert main([*arguments, "--optimize", "bfloat16", str(tmp_path / "image.png")]) == 0


def test_keep_freed_memory_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: None) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", without)
    assert not keep_freed_memory()


def test_matrix_products_stay_exact() -> None:
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(switch, "fp32_precision", None)
    x = torch.randn(300, 200)
    with onednn_matmuls():
        product = x @ x.T
        assert precision._products_are_exact()
    assert getattr(switch, "fp32_precision", None) == before
    torch.testing.assert_close(product.double(), x.double() @ x.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch has no such switch")
def test_matrix_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they would be rounded, where somebody has chosen, and after an error."""
    switch = torch.backends.mkldnn.matmul
    monkeypatch.setattr(precision, "_products_are_exact", lambda: False)
    with onednn_matmuls():
        assert switch.fp32_precision == "none"
    monkeypatch.setattr(precision, "_products_are_exact", lambda: True)
    block = onednn_matmuls()
    with block:
        assert switch.fp32_precision == "bf16"
    assert switch.fp32_precision == "none"
    failing = onednn_matmuls()
    failing.__enter__()
    assert not failing.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert switch.fp32_precision == "none"
    switch.fp32_precision = "ieee"
    try:
        with onednn_matmuls():
            assert switch.fp32_precision == "ieee"
    finally:
        switch.fp32_precision = "none"
