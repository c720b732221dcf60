"""Weights of a backbone: of timm, of the hub, and files under the names of many projects."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file
from served_weights import Repo, Served
from torch import Tensor, nn

from ddetr.errors import InputError
from ddetr.models.backbones import Backbone, find_start
from ddetr.models.backbones.plain_vit import last_map
from tests.models.backbones.test_backbone import images

Weights = dict[str, Tensor]


def random_network(name: str, **options: Any) -> nn.Module:
    """A network of timm in which no two tensors can be taken for each other."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **options).eval()
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in key else torch.randn_like(tensor) * 0.1)
    return network


def load(name: str, path: Path) -> Backbone:
    torch.manual_seed(1)
    return Backbone(name, 3, pretrained=str(path)).eval()


def to_openmmlab_swin(weights: Weights) -> Weights:
    """Written down from its modules and not from our reader."""
    theirs = {}
    for name, tensor in weights.items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda match: f"stages.{int(match[1]) - 1}.downsample", name)
        name = name.replace("layers.", "stages.", 1) if name.startswith("layers.") else name
        name = name.replace(".attn.", ".attn.w_msa.").replace(".mlp.fc1.", ".ffn.layers.0.0.")
        name = name.replace(".mlp.fc2.", ".ffn.layers.1.").replace("patch_embed.proj.", "patch_embed.projection.")
        if (
            "downsample" in name
        ):  # nn.Unfold: all cells of a channel, row by row; timm: all channels of a cell, by column
            cells = tensor.reshape(*tensor.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
            tensor = cells.transpose(-1, -2).reshape(tensor.shape)
        theirs[name] = tensor.clone()
    return theirs


def to_official_swin(weights: Weights) -> Weights:
    """Cells are joined at the end of a stage."""
    pattern = r"^layers\.(\d)\.downsample"
    return {re.sub(pattern, lambda m: f"layers.{int(m[1]) - 1}.downsample", name): t for name, t in weights.items()}


def to_convnext(weights: Weights, names: dict[str, str]) -> Weights:
    theirs = {}
    for name, tensor in weights.items():
        name = re.sub(r"^head\.", "", name) if "norm" in name else name  # the only name of theirs that timm looks for
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name).replace(".blocks.", ".")
        for ours, other in names.items():
            name = name.replace(f".{ours}.", f".{other}.")
        theirs[name] = tensor
    return theirs


def to_openmmlab_convnext(weights: Weights) -> Weights:
    names = {"conv_dw": "depthwise_conv", "mlp.fc1": "pointwise_conv1", "mlp.fc2": "pointwise_conv2"}
    return to_convnext(weights, names)


def to_official_convnext(weights: Weights) -> Weights:
    return to_convnext(weights, {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"})


def to_openmmlab_vit(weights: Weights) -> Weights:
    theirs = {}
    for name, tensor in weights.items():
        name = re.sub(r"^blocks\.(\d+)\.norm(\d)\.", r"layers.\1.ln\2.", name).replace("blocks.", "layers.")
        name = re.sub(r"^norm\.", "ln1.", name).replace("patch_embed.proj.", "patch_embed.projection.")
        theirs[name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")] = tensor
    return theirs


def to_efficientnet_pytorch(weights: Weights) -> Weights:
    """One count of blocks through all stages; no expansion where there is none."""
    places = sorted({tuple(map(int, n.split(".")[1:3])) for n in weights if n.startswith("blocks.")})
    expanded = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    expanded |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    separable = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    theirs = {}
    for name, tensor in weights.items():
        first, *rest = name.split(".")
        if first != "blocks":
            theirs[".".join([top[first], *rest])] = tensor
            continue
        stage, block, part, leaf = int(rest[0]), int(rest[1]), rest[2], rest[3]
        parts = expanded if f"blocks.{stage}.{block}.conv_pwl.weight" in weights else separable
        theirs[f"_blocks.{places.index((stage, block))}.{parts[part]}.{leaf}"] = tensor
    return theirs


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def noise(weights: Weights) -> Weights:
    return {name: torch.randn(tensor.shape) for name, tensor in weights.items()}


# What a file holds, for the weights of a backbone
FILES: dict[str, tuple[str, Callable[[Weights], Any]]] = {
    "timm": ("test_resnet", lambda w: w),
    "wrapped": ("test_resnet", lambda w: {"state_dict": prefixed("module.", w), "epoch": 3}),
    "official detector": (
        "test_resnet",
        lambda w: {"model": prefixed("backbone.0.body.", w) | {"level": w["bn1.bias"]}},
    ),
    "average before weights": ("test_resnet", lambda w: {"model": noise(w), "model_ema": w}),
    "DINO": (
        "test_resnet",
        lambda w: {"student": prefixed("module.backbone.", noise(w)), "teacher": prefixed("backbone.", w)},
    ),
    "MoCo": (
        "test_resnet",
        lambda w: {
            "state_dict": prefixed("module.encoder_k.", noise(w)) | prefixed("module.encoder_q.", w),
            "arch": "resnet50",
        },
    ),
    "MoCo v3": (
        "tiny_vit",
        lambda w: {"state_dict": prefixed("module.base_encoder.", w) | prefixed("module.momentum_encoder.", noise(w))},
    ),
    "SimCLR": ("test_resnet", lambda w: {"state_dict": prefixed("encoder.", w)}),
    "mmdetection": ("test_resnet", lambda w: {"meta": {}, "state_dict": prefixed("backbone.", w)}),
    "OpenMMLab's Swin": ("tiny_swin", lambda w: {"state_dict": prefixed("backbone.", to_openmmlab_swin(w))}),
    "official Swin": ("tiny_swin", lambda w: {"model": to_official_swin(w)}),
    "official Swin detector": ("tiny_swin", lambda w: {"state_dict": prefixed("backbone.", to_official_swin(w))}),
    "OpenMMLab's ConvNeXt": (
        "tiny_convnext",
        lambda w: {"state_dict": prefixed("backbone.", to_openmmlab_convnext(w))},
    ),
    "official ConvNeXt": ("tiny_convnext", lambda w: {"model": to_official_convnext(w)}),
    "OpenMMLab's ViT": ("tiny_vit", lambda w: {"state_dict": prefixed("backbone.", to_openmmlab_vit(w))}),
    "EfficientNet-PyTorch": ("tf_efficientnet_lite0", to_efficientnet_pytorch),
    "Hiera": ("tiny_hiera", lambda w: {"model_state": w}),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_any_project_gives_the_maps_of_its_weights(kind: str, tmp_path: Path) -> None:
    name, content = FILES[kind]
    weights = random_network(name).state_dict()
    torch.save(content(weights), tmp_path / "weights.pth")
    backbone = load(name, tmp_path / "weights.pth")
    flat = {key.replace(".", "_"): tensor for key, tensor in weights.items()}
    for key, tensor in backbone.body.state_dict().items():
        assert tensor.equal(flat[key.removeprefix("model.").replace(".", "_")]), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "tiny_swin", "tiny_convnext", "tf_efficientnet_lite0", "tiny_dinov3"])
def test_the_maps_are_those_of_timm(name: str, tmp_path: Path) -> None:
    network = random_network(name, **{"dynamic_img_size": True} if name == "tiny_dinov3" else {})
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    backbone = load(name, tmp_path / "w.safetensors")
    if name == "tiny_swin":
        network.set_input_size((224, 224), always_partition=True)
    x = images(224, 224, count=1)
    last = network.forward_features(x)
    if backbone.pyramid is not None:
        ours = last_map(backbone.body, x, None)
        last = last[:, network.num_prefix_tokens :].mT.unflatten(2, (14, 14))
    else:
        ours = backbone(x)[-1]
        if name == "tiny_swin":  # timm's features end before the last norm
            ours, last = network.norm(ours.permute(0, 2, 3, 1)), last
        elif name == "tf_efficientnet_lite0":
            ours = network.bn2(network.conv_head(ours))
        elif name == "tiny_convnext":
            last = network.norm_pre(last)
    torch.testing.assert_close(ours, last)


def torchvision_network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    models = torchvision.models
    if kind == "tiny_swin":
        network = models.swin_transformer.SwinTransformer(
            [4, 4], 16, [2, 1, 2, 2], [1, 1, 2, 2], [7, 7], stochastic_depth_prob=0.0
        )
    elif kind == "tiny_convnext":
        sizes = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
        network = models.convnext.ConvNeXt([models.convnext.CNBlockConfig(*size) for size in sizes], layer_scale=1.0)
    else:
        network = models.VisionTransformer(224, 16, 8, 2, 32, 128)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_swin", "tiny_convnext", "tiny_vit"])
def test_a_file_of_torchvision_gives_the_maps_of_its_network(name: str, tmp_path: Path) -> None:
    network = torchvision_network(name)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = load(name, tmp_path / "weights.pth")
    x = images(224, 224, count=1)
    if name == "tiny_vit":
        tokens = network.encoder(torch.cat((network.class_token, network._process_input(x)), 1))[:, 1:]
        torch.testing.assert_close(last_map(backbone.body, x, None), tokens.mT.unflatten(2, (14, 14)))
        return
    x = images(256, 256, count=1)  # at 224 torchvision does not shift the one window of the last stage
    maps = []
    for number, layer in enumerate(network.features):
        x = layer(x)
        maps += [x] * (number in (3, 5, 7))
    for ours, theirs in zip(backbone(images(256, 256, count=1)), maps, strict=True):
        expected = theirs.permute(0, 3, 1, 2) if name == "tiny_swin" else theirs
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("name", "options", "resized"),
    [
        ("tiny_vit", {"img_size": 96}, ["pos_embed"]),
        ("tiny_dinov2", {}, ["patch_embed.proj.weight"]),  # of 14 pixels
        ("tiny_clip", {}, ["patch_embed.proj.weight"]),  # of 32
        ("tiny_swin", {"window_size": 12, "img_size": 384}, ["relative_position_bias_table"]),
    ],
)
def test_what_depends_on_the_image_size_is_resized(
    name: str, options: dict[str, Any], resized: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As timm resizes it where it reads its own weights; tables of relative positions by bicubic interpolation."""
    weights = random_network(name, **options).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    caplog.set_level(logging.INFO)
    backbone = load(name, tmp_path / "weights.pth")
    (line,) = [record.getMessage() for record in caplog.records if "of the backbone found" in record.getMessage()]
    assert all(part in line.split("resized: ")[1] for part in resized)
    assert "left out: " in line
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith("head.")}
    if name == "tiny_swin":  # timm's own way, another, is deprecated by PyTorch
        for key in [key for key in kept if key.endswith("relative_position_bias_table")]:
            grid = kept[key].mT.unflatten(1, (23, 23))[None]
            kept[key] = F.interpolate(grid, (13, 13), mode="bicubic")[0].flatten(1).mT
    arguments = {"num_classes": 0, "pretrained": True, "pretrained_cfg_overlay": {"state_dict": kept}}
    arguments |= {"tiny_dinov2": {"img_size": 80}, "tiny_clip": {"img_size": 112}}.get(name, {})
    if name != "tiny_swin":
        arguments |= {"dynamic_img_size": True, "patch_size": 16}
    expected = {key.replace(".", "_"): t for key, t in timm.create_model(name, **arguments).state_dict().items()}
    for key, tensor in backbone.body.state_dict().items():
        torch.testing.assert_close(tensor, expected[key.replace(".", "_")])


def test_the_line_about_a_file_says_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(to_efficientnet_pytorch(random_network("tf_efficientnet_lite0").state_dict()), tmp_path / "lite0.pth")
    caplog.set_level(logging.INFO)
    load("tf_efficientnet_lite0", tmp_path / "lite0.pth")
    assert "lite0.pth: 288 tensors of the backbone found (names: EfficientNet-PyTorch's); left out: " in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "expected a file of weights"),
        (b"", "expected a file of weights, but its 0 bytes are damaged or cut short"),
        ([1], r"expected the weights of this backbone in timm's names \(conv1\.0\.weight, .*\), got no tensors"),
        ({"fc.weight": torch.zeros(3)}, r".*timm's names .* are missing, first 'conv1.*The file holds 'fc\.weight'"),
        ({"conv1.0.weight": torch.zeros(3)}, ".*are missing and 1 have other shapes"),
    ],
)
def test_a_file_that_is_no_backbone_is_one_sentence(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=rf"weights\.pth: {message}"):
        load("test_resnet", path)


def test_a_file_cut_short_or_not_finite_is_one_sentence(tmp_path: Path) -> None:
    weights = random_network("test_resnet").state_dict()
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"weights\.pth: expected a file of weights, but its .* damaged or cut short"):
        load("test_resnet", path)
    weights["conv1.0.weight"][0] = torch.nan
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"weights\.pth: conv1.*weight holds values that are NaN"):
        load("test_resnet", path)


def test_a_file_is_read_where_the_network_has_no_memory(tmp_path: Path) -> None:
    """As a run checks its options before it starts."""
    torch.save(random_network("test_resnet").state_dict(), tmp_path / "weights.pth")
    with torch.device("meta"):
        assert Backbone("test_resnet", 3, pretrained=str(tmp_path / "weights.pth")).body.conv1


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("resnet50", False, ("resnet50", False, None)),
        ("resnet50", True, ("resnet50.tv_in1k", True, None)),
        ("resnet50", "resnet50.a1_in1k", ("resnet50.a1_in1k", True, None)),
        ("resnet50.a1_in1k", True, ("resnet50.a1_in1k", True, None)),
        ("resnet50", "hf-hub:someone/model", ("hf-hub:someone/model", True, None)),
        ("resnet50", "timm/resnet50.a1_in1k", ("hf-hub:timm/resnet50.a1_in1k", True, None)),
    ],
)
def test_what_the_option_means(name: str, pretrained: bool | str, expected: tuple) -> None:
    assert tuple(find_start(name, pretrained)) == expected


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("resnet51", False, "unknown backbone 'resnet51'.*did you mean"),
        ("resnet50.nowhere", True, r"unknown weights 'resnet50\.nowhere': timm has resnet50\.a1_in1k"),
        ("resnet50", "resnet50.nowhere", r"unknown weights 'resnet50\.nowhere'"),
        ("resnet50", "resnet18.a1_in1k", "expected weights of resnet50, got the name 'resnet18.a1_in1k'"),
        ("resnet50", "weights.pth", "got 'weights.pth', and there is no such file"),
        ("resnet50", "folder/weights.pth", "got 'folder/weights.pth', and there is no such file"),
        ("resnet50", "a/b/c", "there is no such file"),
        ("resnet61q", "yes", "there is no such file"),
        ("hiera_base_abswin_256", True, "timm has no weights of 'hiera_base_abswin_256'"),
    ],
)
def test_what_the_option_cannot_mean(name: str, pretrained: bool | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_start(name, pretrained)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_on_hub(hub: Path, address: str, architecture: str, weights: Weights, **config: Any) -> None:
    folder = hub / f"models--{address.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    pretrained = {"input_size": [3, 64, 64], "num_classes": 3, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]} | config
    (snapshot / "config.json").write_text(
        json.dumps({"architecture": architecture, "num_classes": 3, "pretrained_cfg": pretrained})
    )
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, snapshot / "model.safetensors")


def test_weights_of_the_hub(hub: Path) -> None:
    """With the normalisation that its configuration says."""
    weights = random_network("test_resnet").state_dict()
    put_on_hub(hub, "someone/model", "test_resnet", weights, first_conv="conv1", classifier="fc")
    for address in ("hf-hub:someone/model", "someone/model"):
        backbone = Backbone("test_resnet", 3, pretrained=address)
        assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        for name, tensor in backbone.body.state_dict().items():
            assert tensor.equal(weights[name]), name
    with pytest.raises(InputError, match="expected weights of the backbone resnet18, got those of test_resnet"):
        Backbone("resnet18", 3, pretrained="someone/model")


def not_had(pretrained: bool | str) -> str:
    with pytest.raises(InputError) as error:
        Backbone("resnet18", 3, pretrained=pretrained)
    text = str(error.value)
    assert "\n" not in text
    assert "..." not in text
    assert re.match(r"the weights of '[\w:/.-]+' could not be had: ", text)
    assert "is given by --model.pretrained_backbone FILE; with false it starts from random values" in text
    assert "Error" not in text.partition("could not be had")[2], "no words of another library"
    return text


@pytest.mark.parametrize(
    ("pretrained", "place"),
    [
        (True, "timm/resnet18.a1_in1k"),
        ("resnet18.fb_ssl_yfcc100m_ft_in1k", "timm/resnet18.fb_ssl_yfcc100m_ft_in1k"),
        ("someone/nothing", "someone/nothing"),
    ],
)
def test_without_a_network_it_is_one_sentence(
    served: Served, monkeypatch: pytest.MonkeyPatch, pretrained: bool | str, place: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    nowhere = "http://127.0.0.1:9"
    with monkeypatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", nowhere)
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
        message = not_had(pretrained)
        assert f"{place} cannot be downloaded from {nowhere} (there is no connection to it: " in message
        assert f"download it where there is a network ({nowhere}/{place}), and give the file itself" in message
    served.is_down = True
    assert f"{place} cannot be downloaded from {served.address} (the hub answers 503)" in not_had(pretrained)
    served.is_down = False
    assert "the hub has no such repository, or it is private: check the name" in not_had(pretrained)
    served.repos[place] = Repo(gated=True)
    assert f"accept their conditions on {served.address}/{place}, then log in" in not_had(pretrained)
    served.repos[place] = Repo()
    file = "config.json" if pretrained == place else "such file"
    assert f"{place}: the repository has no {file}: see {served.address}/{place}/tree/main" in not_had(pretrained)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{place} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it" in not_had(pretrained)
