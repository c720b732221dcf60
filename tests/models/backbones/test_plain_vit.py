"""Plain vision transformers: one map, windows, and the feature pyramid."""

import pytest
import timm
import torch
from torch import nn

from ddetr.models.backbones import Backbone
from ddetr.models.backbones.plain_vit import last_map, patch_arguments
from tests.models.backbones.test_backbone import PLAIN, expected_shapes, images


@pytest.fixture(params=PLAIN)
def vit(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    body = Backbone(request.param, 3).eval().body
    with torch.no_grad():  # timm starts near zero, where every block is nearly the identity
        for parameter in body.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return body


@torch.no_grad()
def test_the_map_is_that_of_timm(vit: nn.Module) -> None:
    x = images(48, 80)
    expected = vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(last_map(vit, x, None), expected)


@torch.no_grad()
def test_a_window_as_large_as_the_image_changes_nothing(vit: nn.Module) -> None:
    """Nor what fills it up."""
    x = images(48, 80)
    for window in (5, 8):
        torch.testing.assert_close(last_map(vit, x, window), last_map(vit, x, None), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_blocks_see_their_window_alone(vit: nn.Module) -> None:
    """Four windows of 2 x 2 patches; of 8 blocks each second is global."""
    x = images(64, 64)
    changed = x.clone()
    changed[:, :, 32:, 32:] = 0.0  # the window at the bottom right

    def after_first_block(image: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = vit.blocks[0].register_forward_hook(lambda *call: seen.append(call[-1]))
        last_map(vit, image, 2)
        hook.remove()
        return seen[0].unflatten(0, (len(image), 4))

    before, after = after_first_block(x), after_first_block(changed)
    assert before[:, :3].equal(after[:, :3])
    assert not before[:, 3].equal(after[:, 3])
    assert not last_map(vit, x, 2)[:, :, :2, :2].equal(last_map(vit, changed, 2)[:, :, :2, :2]), "global blocks"


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_dinov3", "tiny_rope_mixed", "tiny_eva02", "tiny_vit"])
def test_a_window_has_the_positions_of_its_place(name: str) -> None:
    """A block in windows is the block on each window by itself, with the rotations of its tokens."""
    torch.manual_seed(0)
    vit = Backbone(name, 3).eval().body
    x = images(64, 96, count=1)
    embedded = vit._pos_embed(vit.patch_embed(x))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    tokens = vit.norm_pre(tokens)
    num_prefix = tokens.shape[1] - 24
    places = torch.arange(24).view(4, 6)[2:4, 4:6].flatten()  # the last of six windows
    window = torch.cat((tokens[:, :num_prefix], tokens[:, num_prefix:][:, places]), 1)
    rotation = {}
    if rope is not None:
        of_block = rope[0] if getattr(vit, "rope_mixed", False) else rope
        rotation = {"rope": of_block[..., places, :]}
    expected = vit.blocks[0](window, **rotation)
    seen: list[torch.Tensor] = []
    vit.blocks[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    last_map(vit, x, 2)
    torch.testing.assert_close(seen[0][5:6], expected)


def test_patches_of_14_become_16_on_the_same_grid() -> None:
    assert patch_arguments("vit_small_patch14_dinov2") == {"patch_size": 16, "img_size": (592, 592)}  # 37 x 37 patches
    assert patch_arguments("vit_base_patch16_224") == {}
    body = Backbone("tiny_dinov2", 3).body
    assert body.patch_embed.proj.weight.shape == (32, 3, 16, 16)
    assert body.pos_embed.shape == timm.create_model("tiny_dinov2").pos_embed.shape


@pytest.mark.parametrize(
    ("num_features", "dilation", "strides"),
    [(1, False, [32]), (1, True, [16]), (2, False, [16, 32]), (3, False, [8, 16, 32]), (4, False, [4, 8, 16, 32])],
)
def test_the_pyramid_has_the_strides_that_are_asked_for(num_features: int, dilation: bool, strides: list[int]) -> None:
    torch.manual_seed(0)
    backbone = Backbone("tiny_vit", num_features, dilation=dilation, window=2)
    assert backbone.strides == strides
    maps = backbone(images(50, 70))
    assert [tuple(one.shape) for one in maps] == expected_shapes(backbone, 50, 70)
    names = {key.split(".")[1] for key in backbone.state_dict() if key.startswith("pyramid.")}
    assert names == {f"stride{stride}" for stride in strides}
    for one in maps:  # a layer norm over channels is the last
        torch.testing.assert_close(one.mean(1), torch.zeros_like(one.mean(1)), atol=1e-5, rtol=0)
        torch.testing.assert_close(one.var(1, correction=0), torch.ones_like(one.mean(1)), atol=1e-3, rtol=0)


def test_what_is_behind_the_last_norm_is_not_there() -> None:
    """A class head, attention pooling: they would never get a gradient."""
    names = set(Backbone("tiny_siglip", 3).body.state_dict())
    assert {name.split(".")[0] for name in names} == {"pos_embed", "patch_embed", "blocks", "norm"}


def test_it_can_be_exported() -> None:
    """No step of it asks for the value of a tensor."""
    backbone = Backbone("tiny_dinov3", 3, window=2).eval()
    backbone.body.blocks = backbone.body.blocks[:5]  # of which one is no global one
    x = images(50, 70, count=1)
    exported = torch.export.export(backbone, (x,)).module()
    for one, two in zip(exported(x), backbone(x), strict=True):
        torch.testing.assert_close(one, two)
