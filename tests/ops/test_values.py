"""Each back end on the CPU against float64: output and every gradient, over shapes."""

import pytest
import torch
from attention_inputs import make_inputs, relative_error, truth

from ddetr.ops import embedding_bag
from ddetr.ops.native import library

try:
    library.load()
    NATIVE = pytest.param(library, id="native")
except library.NativeUnavailableError as error:
    NATIVE = pytest.param(library, id="native", marks=pytest.mark.skip(reason=str(error)))
BACKENDS = [NATIVE, pytest.param(embedding_bag, id="embedding_bag")]

CASES = {
    "one of everything": {"n": 1, "m": 1, "d": 8, "shapes": [(1, 1)], "p": 1, "q": 1},
    "usual": {"n": 2, "m": 8, "d": 32, "shapes": [(10, 13), (5, 7), (3, 4), (2, 2)], "p": 4, "q": 50},
    "encoder: as many queries as cells": {"n": 1, "m": 4, "d": 16, "shapes": [(9, 8), (4, 4)], "p": 4, "q": 88},
    "decoder: few queries, many cells": {"n": 2, "m": 4, "d": 32, "shapes": [(20, 21), (10, 11)], "p": 4, "q": 3},
    "batch of 65": {"n": 65, "m": 1, "d": 4, "shapes": [(2, 3)], "p": 2, "q": 4},
    "head size 7": {"m": 3, "d": 7, "p": 3, "q": 40},
    "head size 1": {"m": 2, "d": 1, "p": 2, "q": 30},
    "head size 12": {"m": 2, "d": 12, "p": 5, "q": 11},
    "head size 24": {"m": 2, "d": 24, "p": 1, "q": 33},
    "head size 64": {"m": 2, "d": 64, "p": 8, "q": 17},
    "head size 100": {"m": 1, "d": 100, "p": 2, "q": 6},
    "five levels": {"m": 2, "d": 16, "shapes": [(7, 6), (4, 3), (2, 2), (1, 2), (1, 1)], "p": 3, "q": 21},
    "one level of one column": {"m": 2, "d": 8, "shapes": [(31, 1)], "p": 4, "q": 12},
    "many points": {"m": 1, "d": 8, "p": 70, "q": 5},
    "no query": {"m": 2, "d": 8, "q": 0},
    "no image": {"n": 0, "m": 2, "d": 8},
}


@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend, case, reference):
    inputs = make_inputs(**case, reference=reference)
    output, grad_output, grads = truth(inputs)
    value, points, weights, references = inputs.cast(torch.float32)[1:]
    got = backend.forward(value, inputs.flat, points, weights, references)
    assert relative_error(got, output) < 1e-5
    got_grads = backend.backward(grad_output.float(), value, inputs.flat, points, weights, references, True)
    for got_grad, grad in zip(got_grads, grads):
        assert got_grad.dtype == torch.float32
        assert relative_error(got_grad, grad) < 2e-5


# The inputs are exact in bfloat16, so the differences are the rounding of what comes out: 2**-8 of each value.
@pytest.mark.parametrize("points_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "q"), [(32, 4), (32, 200), (7, 30)])
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, reference, d, q, dtype, points_dtype):
    inputs = make_inputs(n=2, m=2, d=d, q=q, reference=reference, dtype=torch.bfloat16)
    output, grad_output, grads = truth(inputs)
    value, points, weights, references = inputs.cast(dtype, points_dtype)[1:]
    got = backend.forward(value, inputs.flat, points, weights, references)
    assert got.dtype == dtype
    assert relative_error(got, output) < 4e-3
    got_grads = backend.backward(grad_output.to(dtype), value, inputs.flat, points, weights, references, True)
    for got_grad, grad, tensor in zip(got_grads, grads, (value, points, weights, references)):
        assert got_grad.dtype == tensor.dtype
        assert relative_error(got_grad, grad) < 4e-3


def test_float64_is_stock_pytorch():
    inputs = make_inputs()
    output, grad_output, grads = truth(inputs)
    arguments = (inputs.value.detach(), inputs.flat, inputs.points, inputs.weights, inputs.reference)
    with torch.no_grad():
        got = embedding_bag.forward(*arguments)
        got_grads = embedding_bag.backward(grad_output, *arguments)
    assert relative_error(got, output) < 1e-12
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(got_grads, grads))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("reference", [0, 2, 4])
def test_float64_beside_float32(reference, dtypes):
    inputs = make_inputs(reference=reference)
    output, grad_output, grads = truth(inputs)
    arguments = inputs.cast(*dtypes)
    arguments = (arguments.value, arguments.flat, *arguments[2:])
    got = embedding_bag.forward(*arguments)
    got_grads = embedding_bag.backward(grad_output.to(dtypes[0]), *arguments)
    assert got.dtype == dtypes[0]
    assert relative_error(got, output) < (1e-12 if dtypes[0] == torch.float64 else 1e-5)
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(got_grads, grads))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -1e20, 2.0**31])
@pytest.mark.parametrize("q", [2, 60])
@pytest.mark.parametrize("backend", BACKENDS)
def test_points_at_no_place_count_as_outside(backend, q, bad):
    inputs = make_inputs(reference=0, q=q)
    value, points, weights, _ = inputs.cast(torch.float32)[1:]
    points[0, 1, 0, 0, 0, 0] = bad
    points[0, 1, 1, 1, 2, 1] = bad
    got = backend.forward(value, inputs.flat, points, weights, None)
    outside = points.clone()
    outside[0, 1, 0, 0, 0, 0] = outside[0, 1, 1, 1, 2, 1] = -9.0
    torch.testing.assert_close(got, backend.forward(value, inputs.flat, outside, weights, None), rtol=0, atol=0)
    grads = backend.backward(torch.ones_like(got), value, inputs.flat, points, weights, None)
    assert all(grad.isfinite().all() for grad in grads[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_on_the_border(backend):
    # The edges of the image are half a cell beyond the outer cells' centres: half the value is left there.
    value = torch.ones(1, 6, 1, 4)
    points = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.5, 0.5], [0.0, 0.0], [-0.25, 0.5]]).view(1, 5, 1, 1, 1, 2)
    got = backend.forward(value, [3, 2], points, torch.ones(1, 5, 1, 1, 1), None)
    torch.testing.assert_close(got[0, :, 0], torch.tensor([0.5, 0.5, 1.0, 0.25, 0.0]))


@pytest.mark.parametrize("library", [NATIVE])
def test_infinite_values_elsewhere_do_not_leak(library):
    value = torch.zeros(1, 12, 1, 8)
    value[0, 0] = float("inf")
    value[0, -1] = float("nan")
    points = torch.full((1, 40, 1, 1, 1, 2), -7.0)
    for queries in (2, 40):  # with and without packing
        got = library.forward(value, [3, 4], points[:, :queries], torch.ones(1, queries, 1, 1, 1), None)
        assert (got == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits_have_no_weight(backend):
    inputs = make_inputs(reference=2)
    value, points, weights, references = inputs.cast(torch.float32)[1:]
    weights[..., 1] = -float("inf")
    points_elsewhere = points.clone()
    points_elsewhere[..., 1, :] += 1
    got = [backend.forward(value, inputs.flat, x, weights, references) for x in (points, points_elsewhere)]
    assert got[0].isfinite().all()
    assert torch.equal(*got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Views as models make them: one linear layer split in two, a transposed value, a sliced batch, an expanded one."""
    inputs = make_inputs(n=3, m=2, d=8, p=4, q=30)
    value, points, weights, references = inputs.cast(torch.float32)[1:]
    n, q, per_query = 3, 30, 2 * 2 * 4
    joint = torch.cat([points.reshape(n, q, -1), weights.reshape(n, q, -1)], -1)
    points_view = joint[..., : per_query * 2].view(points.shape)
    weights_view = joint[..., per_query * 2 :].view(weights.shape)
    transposed = value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wide = torch.cat([value, value], 1)[:, : value.shape[1]]
    expanded = references[:, :, :1].expand_as(references)
    grad = torch.ones(n, q, 16)[..., ::2].repeat_interleave(2, -1)
    for value_view in (transposed, wide):
        same = (value.contiguous(), inputs.flat, points, weights, expanded.contiguous())
        view = (value_view, inputs.flat, points_view, weights_view, expanded)
        assert torch.equal(backend.forward(*same), backend.forward(*view))
        for a, b in zip(backend.backward(grad, *same), backend.backward(grad.transpose(0, 1).transpose(0, 1), *view)):
            assert torch.equal(a, b)
            assert b.is_contiguous()
