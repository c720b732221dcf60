"""Each back end on the CPU against float64 on random shapes and memory layouts, and where index arithmetic could
end."""

import math
from pathlib import Path

import pytest
import torch
from attention_inputs import Inputs, make_inputs, truth
from hypothesis import HealthCheck, configuration, example, given, settings
from hypothesis import strategies as st

from ddetr.ops import embedding_bag, ms_deform_attn, ms_deform_attn_step
from ddetr.ops.native import library

try:
    library.load()
    NATIVE = pytest.param(library, id="native")
except library.NativeUnavailableError as error:
    NATIVE = pytest.param(library, id="native", marks=pytest.mark.skip(reason=str(error)))
BACKENDS = pytest.mark.parametrize("backend", [NATIVE, pytest.param(embedding_bag, id="embedding_bag")])
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}

# What hypothesis keeps of the sources it read, even without a database of examples, goes where git doesn't look.
configuration.set_hypothesis_home_dir(Path(__file__).parents[2] / ".pytest_cache" / "hypothesis")
same_everywhere = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)


def pixels_of(inputs: Inputs) -> torch.Tensor:
    """(N, Q, M, L, P, 2) where the points lie, in cells of their level, cell centres at whole numbers."""
    cells = torch.tensor([[w, h] for h, w in inputs.shapes], dtype=torch.float64)[:, None]
    if inputs.reference is None:
        return inputs.points * cells - 0.5
    around = inputs.reference[:, :, None, :, None]
    scale = 1 if around.shape[-1] == 2 else around[..., 2:] * cells * (0.5 / inputs.points.shape[4])
    return around[..., :2] * cells - 0.5 + inputs.points * scale


def off_the_kinks(inputs: Inputs) -> Inputs:
    """Points that lie on a line between cells moved off it: there the gradient jumps, and rounding decides which
    way."""
    with torch.no_grad():
        for _ in range(3):
            pixels = pixels_of(inputs)
            inputs.points.add_(((pixels - pixels.round()).abs() < 1e-4) * 0.0078125)
    return as_float32(inputs)


def as_float32(inputs: Inputs) -> Inputs:
    """What float32 holds of the numbers, as float64 leaves."""
    inputs = inputs.cast(torch.float32).cast(torch.float64)
    for tensor in inputs.tensors:
        tensor.requires_grad_()
    return inputs


def stored_otherwise(tensor: torch.Tensor, inner: int) -> torch.Tensor:
    """The same numbers with a gap after each row and queries before images."""
    wide = torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    return wide if inner else wide.transpose(0, 1).contiguous().transpose(0, 1)


def assert_close(got, expected, tolerance, what):
    assert got.shape == expected.shape, what
    if expected.numel():
        error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error.item() < tolerance, what


def compare(backend, inputs: Inputs, dtype, expected, strided=False):
    """Output and gradients of a back end, `inputs` in float32 and the values in `dtype`, with those `expected`."""
    output, grad_output, grads = expected
    value, points, weights, reference = inputs.cast(dtype, torch.float32)[1:]
    if strided:
        value, points, weights = stored_otherwise(value, 0), stored_otherwise(points, 1), stored_otherwise(weights, 0)
    arguments = (value, inputs.flat, points, weights, reference)
    got = backend.forward(*arguments)
    assert got.dtype == dtype
    assert_close(got, output, TOLERANCES[dtype], "output")
    got_grads = backend.backward(grad_output.to(dtype), *arguments)
    assert [grad.dtype for grad in got_grads[:3]] == [dtype, torch.float32, torch.float32]
    for name, got_grad, grad in zip(("value", "points", "weights", "references"), got_grads, grads):
        assert_close(got_grad, grad, TOLERANCES[dtype], f"gradient of {name}")


LEVELS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=5)
SIZES = {
    "n": st.integers(1, 3),
    "m": st.integers(1, 9),
    "d": st.sampled_from([8, 16, 24, 32, 40, 48, 56, 64]) | st.integers(1, 70),
    "shapes": LEVELS | st.just([(1, 1)]) | st.just([(1, 1), (1, 9), (9, 1)]),
    "p": st.integers(1, 9),
    "q": st.integers(0, 80),
    "reference": st.sampled_from([0, 2, 4]),
    "seed": st.integers(0, 1000),
}


@BACKENDS
@given(
    sizes=st.fixed_dictionaries(SIZES),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
)
@same_everywhere
def test_random_shapes(backend, sizes, dtype, strided):
    inputs = off_the_kinks(make_inputs(**sizes, dtype=torch.bfloat16))
    compare(backend, inputs, dtype, truth(inputs), strided)


@BACKENDS
@given(
    where=st.lists(
        st.tuples(
            st.integers(0, 100_000), st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e9, -(2.0**31)])
        ),
        min_size=1,
        max_size=20,
    ),
    edges=st.lists(st.tuples(st.integers(0, 100_000), st.sampled_from([0.0, -0.0, 1.0])), max_size=20),
    q=st.sampled_from([1, 3, 70]),
    shapes=LEVELS,
    d=st.sampled_from([7, 8, 32]),
)
@example(where=[(0, math.nan)], edges=[(1, 1.0)], q=1, shapes=[(1, 1)], d=8)
@same_everywhere
def test_points_at_the_edges_and_at_no_place(backend, where, edges, q, shapes, d):
    inputs = off_the_kinks(make_inputs(m=3, d=d, shapes=shapes, p=2, q=q, reference=0))
    far = [place % inputs.points.numel() for place, _ in where]
    with torch.no_grad():
        for place, location in edges:
            inputs.points.view(-1)[place % inputs.points.numel()] = location
        inputs.points.view(-1)[far] = -9.0
    inputs = as_float32(inputs)
    expected = truth(inputs)
    with torch.no_grad():
        for place, (_, location) in zip(far, where):
            inputs.points.view(-1)[place] = location
    compare(backend, inputs, torch.float32, expected)


@BACKENDS
@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 154])  # the official kernel wants a batch that 64 divides
def test_batches(backend, n, reference):
    inputs = off_the_kinks(make_inputs(n=n, m=2, d=8, shapes=[(3, 4), (2, 2)], p=2, q=5, reference=reference))
    compare(backend, inputs, torch.float32, truth(inputs))


@BACKENDS
def test_points_on_cell_centres(backend):
    """Exactly there the output is the cell's value, in every cell of levels of any size."""
    for h, w in ((1, 1), (1, 7), (5, 3), (8, 16), (13, 11)):
        value = torch.rand(2, h * w, 3, 8)
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        centres = torch.stack([(x + 0.5) / w, (y + 0.5) / h], -1).reshape(1, h * w, 1, 1, 1, 2)
        got = backend.forward(value, [h, w], centres.expand(2, -1, 3, -1, -1, -1), torch.ones(2, h * w, 3, 1, 1), None)
        torch.testing.assert_close(got, value.flatten(2), rtol=0, atol=2e-6)


@BACKENDS
@pytest.mark.parametrize("reference", [0, 2, 4])
def test_no_queries(backend, reference):
    inputs = make_inputs(n=2, q=0, reference=reference).cast(torch.float32)
    tensors = inputs[1:]
    output = backend.forward(tensors[0], inputs.flat, *tensors[1:])
    assert output.shape == (2, 0, 16)
    grads = backend.backward(output, tensors[0], inputs.flat, *tensors[1:])
    assert (grads[0] == 0).all()
    assert [grad.shape for grad in grads if grad is not None] == [t.shape for t in tensors if t is not None]


@BACKENDS
def test_the_backward_gives_the_same_bits_again(backend):
    inputs = make_inputs(n=2, m=4, d=32, shapes=[(20, 21), (10, 11)], q=300)
    arguments = (inputs.cast(torch.float32).value, inputs.flat, *inputs.cast(torch.float32)[2:])
    grad_output = torch.rand(2, 300, 128)
    first, again = backend.backward(grad_output, *arguments), backend.backward(grad_output, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


# ---- where 32 bits end: tensors that repeat one small memory, or that nothing was written to -----------------------


@pytest.mark.parametrize(("n", "dtype"), [(31, torch.int32), (32, torch.int64), (200, torch.int64)])
def test_embedding_bag_rows_beyond_32_bits(n, dtype):
    h = w = 2**11
    m, padded = 16, (h + 4) * (w + 2) + 2
    assert (n * padded * m < 2**31) == (n == 31)
    value = torch.zeros(1, 1, 1, 1).expand(n, h * w, m, 1)
    points = torch.tensor([1 - 0.5 / w, 1 - 0.5 / h]).expand(n, 1, m, 1, 1, 2)  # the last cell
    levels = embedding_bag._Levels(value, [h, w], points)
    assert levels.index_dtype == dtype
    (chunk,) = embedding_bag._chunks(levels, points, torch.ones(n, 1, m, 1, 1), None, 2**20)
    cell = 2 * (w + 2) + 2 + (h - 1) * (w + 2) + w - 1
    expected = [[(image * padded + cell) * m + head for head in range(m)] for image in range(n)]
    assert chunk.rows[:, :, 0, 0].tolist() == expected
    assert (chunk.rows[:, :, 3, 0] - chunk.rows[:, :, 0, 0] == (w + 3) * m).all()


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_level_beyond_32_bits(backend):
    """2**31 numbers of one image, of which only the cells around the points exist in memory."""
    h, w, d = 2**12, 2**14, 32
    try:
        value = torch.empty(1, h * w, 1, d)
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    assert value.numel() == 2**31
    cells = [(0, 0), (1, w - 1), (h - 1, 0), (h - 2, w - 2), (h - 1, w - 1)]
    for y, x in cells:
        value[0, y * w + x, 0] = torch.arange(d) + 100 * x + y
    points = torch.tensor([[(x + 0.5) / w, (y + 0.5) / h] for y, x in cells]).view(1, len(cells), 1, 1, 1, 2)
    got = backend.forward(value, [h, w], points, torch.ones(1, len(cells), 1, 1, 1), None)
    for (y, x), row in zip(cells, got[0]):
        torch.testing.assert_close(row, torch.arange(d) + 100.0 * x + y)


@pytest.mark.parametrize("backend", [NATIVE])
def test_more_cells_than_the_kernel_counts(backend):
    value = torch.zeros(1, 1, 1, 1).expand(1, 2**28, 1, 1)
    points, weights = torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"value has S=268435456 cells, .* less than 2\*\*28: use DDETR_OPS=reference"):
        backend.forward(value, [2**14, 2**14], points, weights, None)
    with pytest.raises(ValueError, match="S=268435456"):
        backend.backward(torch.ones(1, 1, 1), value, [2**14, 2**14], points, weights, None)


def test_shapes_beyond_32_bits():
    """Nothing on the way to a back end counts elements in 32 bits."""
    n, h, w, m, d, q = 64, 2048, 2048, 8, 32, 2**20  # 2**36 values, 2**31 points
    with torch.device("meta"):
        value = torch.empty(n, h * w, m, d, requires_grad=True)
        points = torch.empty(n, q, m, 1, 4, 2, requires_grad=True)
        weights = torch.empty(n, q, m, 1, 4, requires_grad=True)
        references = torch.empty(n, q, 1, 4, requires_grad=True)
    output = torch.ops.ddetr.ms_deform_attn(value, [h, w], points, weights, references)
    assert output.shape == (n, q, m * d)
    tensors = (value, points, weights, references)
    grads = torch.autograd.grad(output.sum(), tensors)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
    assert ms_deform_attn(value, [(h, w)], points, weights).shape == output.shape
    assert ms_deform_attn_step(value, [(h, w)], points, weights, references).shape == output.shape
