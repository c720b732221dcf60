"""The public functions and the torch.library operator: autograd, compile, export, autocast, wrong arguments."""

import warnings

import pytest
import torch
from attention_inputs import make_inputs, relative_error, truth
from torch.autograd import forward_ad

from ddetr.models import attention
from ddetr.models.attention import MSDeformAttn
from ddetr.ops import ms_deform_attn, ms_deform_attn_step
from ddetr.ops.reference import attention_step_reference, ms_deform_attn_gather, ms_deform_attn_reference

# PyTorch loads its rules for tangents by the `torch.jit.script` that it warns of.
TANGENTS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
REFERENCES = pytest.mark.parametrize("reference", [0, 2, 4])


def call(inputs, *tensors):
    value, points, weights, *references = tensors or inputs.tensors
    if references:
        return ms_deform_attn_step(value, inputs.shapes, points, weights, references[0])
    return ms_deform_attn(value, inputs.shapes, points, weights)


def leaves(inputs, dtype=torch.float32):
    return [t.requires_grad_() for t in inputs.cast(dtype).tensors]


@REFERENCES
def test_output_and_gradients(reference):
    inputs = make_inputs(n=2, m=4, d=16, q=20, reference=reference)
    output, grad_output, grads = truth(inputs)
    tensors = leaves(inputs)
    got = call(inputs, *tensors)
    assert got.shape == (2, 20, 64)
    assert relative_error(got.detach(), output) < 1e-5
    for got_grad, grad in zip(torch.autograd.grad(got, tensors, grad_output.float()), grads):
        assert relative_error(got_grad, grad) < 2e-5


@REFERENCES
@pytest.mark.parametrize("twice", [False, True])
def test_gradcheck_reference(reference, twice):
    inputs = make_inputs(d=3, p=2, q=3, reference=reference)
    function = lambda v, p, w, r=None: attention_step_reference(v, inputs.shapes, p, w, r, by_gathers=twice)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs.tensors, fast_mode=True)
    if twice:
        assert torch.autograd.gradgradcheck(function, inputs.tensors, fast_mode=True)


@REFERENCES
def test_gradcheck_operator(reference):
    inputs = make_inputs(d=3, p=2, q=3, reference=reference)
    assert torch.autograd.gradcheck(lambda *t: call(inputs, *t), inputs.tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: call(inputs, *t), inputs.tensors, fast_mode=True)


@TANGENTS
@REFERENCES
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float32)])
def test_forward_mode(reference, dtypes):
    """The tangent of the output along the inputs' tangents is what the gradients say; of float64 values and float32
    locations too."""
    inputs = make_inputs(n=2, m=4, d=16, q=20, reference=reference)
    _, grad_output, grads = truth(inputs)
    tensors = inputs.cast(*dtypes).tensors
    tangents = [torch.randn_like(t) for t in tensors]
    output, tangent = torch.func.jvp(lambda *t: call(inputs, *t), tuple(tensors), tuple(tangents))
    torch.testing.assert_close(output, call(inputs, *tensors), rtol=1e-5, atol=1e-5)
    expected = sum((grad * t.double()).sum() for grad, t in zip(grads, tangents))
    torch.testing.assert_close((tangent.double() * grad_output).sum(), expected, rtol=1e-4, atol=1e-3)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, along) for t, along in zip(tensors, tangents)]
        torch.testing.assert_close(forward_ad.unpack_dual(call(inputs, *duals)).tangent, tangent)


@TANGENTS
@REFERENCES
def test_forward_mode_by_differences(reference):
    inputs = make_inputs(d=3, p=2, q=3, reference=reference)
    run = lambda *t: call(inputs, *t)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs.tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs.tensors, fast_mode=True, check_fwd_over_rev=True)


@TANGENTS
def test_forward_mode_through_a_model():
    model, shapes = TwoLayers().double(), [(6, 5), (3, 2)]
    memory, references, images = layers_inputs(shapes)
    memory, along = memory.double(), torch.randn(memory.shape, dtype=torch.float64)
    run = lambda x: model(x, references.double(), images)  # noqa: E731
    _, tangent = torch.func.jvp(run, (memory,), (along,))
    by_difference = (run(memory + 1e-7 * along) - run(memory - 1e-7 * along)) / 2e-7
    torch.testing.assert_close(tangent, by_difference, rtol=1e-4, atol=1e-4)


@TANGENTS
def test_forward_mode_compiled():
    torch._dynamo.reset()
    inputs = make_inputs()
    tensors = tuple(t.detach() for t in inputs.tensors)
    run = lambda *t: torch.func.jvp(lambda *t: call(inputs, *t), t, t)[1]  # noqa: E731
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors))


@TANGENTS
def test_the_operator_itself_refuses_tangents():
    """Its results would count as constants, as would its gradients, the gradients' and those of a graph from before."""
    inputs = make_inputs(reference=2).cast(torch.float32)
    tensors = (inputs.points, inputs.weights, inputs.reference)
    refused = pytest.raises(NotImplementedError, match="has no forward-mode derivative")
    with refused:
        torch.func.jvp(lambda v: torch.ops.ddetr.ms_deform_attn(v, inputs.flat, *tensors), *[(inputs.value,)] * 2)
    value, points = inputs.value.requires_grad_(), inputs.points.requires_grad_()
    output = call(inputs)
    (grad,) = torch.autograd.grad(output.sum(), value, create_graph=True)
    with forward_ad.dual_level():
        for result in (output, grad):
            ones = torch.ones_like(result)
            with refused:
                torch.autograd.grad(result, points if result is grad else value, forward_ad.make_dual(ones, ones))


@pytest.mark.parametrize("function", [ms_deform_attn_reference, ms_deform_attn_gather])
def test_gradcheck_in_full(function):
    """Every entry of the Jacobian (the checks above project it), of one point that lies outside, too."""
    inputs = make_inputs(d=2, m=1, p=1, q=2, shapes=[(3, 2), (1, 1)], reference=0)
    with torch.no_grad():
        inputs.points[0, 0, 0, 0, 0] = 1.7
    assert torch.autograd.gradcheck(lambda v, p, w: function(v, inputs.shapes, p, w), inputs.tensors)
    if function is ms_deform_attn_gather:
        assert torch.autograd.gradgradcheck(lambda v, p, w: function(v, inputs.shapes, p, w), inputs.tensors)


@REFERENCES
def test_both_references_agree(reference):
    inputs = make_inputs(n=2, m=3, q=15, reference=reference)
    arguments = (inputs.value, inputs.shapes, inputs.points, inputs.weights, inputs.reference)
    by_sampling = attention_step_reference(*arguments)
    by_gathers = attention_step_reference(*arguments, by_gathers=True)
    torch.testing.assert_close(by_sampling, by_gathers)


def test_gradient_of_some_inputs_only():
    inputs = make_inputs()
    all_leaves = leaves(inputs)
    expected = torch.autograd.grad(call(inputs, *all_leaves).sum(), all_leaves)
    for wanted, expected_grad in zip(all_leaves, expected):
        tensors = [t if t is wanted else t.detach() for t in all_leaves]
        (grad,) = torch.autograd.grad(call(inputs, *tensors).sum(), wanted)
        torch.testing.assert_close(grad, expected_grad)


def test_gradient_of_an_expanded_output():
    inputs = make_inputs()
    tensors = leaves(inputs)
    (by_sum,) = torch.autograd.grad(call(inputs, *tensors).sum(), tensors[0])
    output = call(inputs, *tensors)
    (by_ones,) = torch.autograd.grad(output, tensors[0], torch.ones_like(output))
    assert torch.equal(by_sum, by_ones)


@pytest.mark.filterwarnings("ignore")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@REFERENCES
def test_opcheck(reference, dtype):
    inputs = make_inputs(reference=reference)
    tensors = leaves(inputs, dtype)
    value, points, weights, references = [*tensors, None][:4]
    arguments = (value, inputs.flat, points, weights, references)
    # bfloat16 is too coarse for opcheck's comparison of gradients
    tests = ("test_schema", "test_autograd_registration", "test_faketensor") + (
        ("test_aot_dispatch_dynamic",) if dtype == torch.float32 else ()
    )
    torch.library.opcheck(torch.ops.ddetr.ms_deform_attn.default, arguments, test_utils=tests)
    grad = torch.rand_like(call(inputs, *tensors)).detach()
    torch.library.opcheck(torch.ops.ddetr.ms_deform_attn_backward.default, (grad, *arguments, True), test_utils=tests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@REFERENCES
def test_compile_without_graph_break(reference):
    torch._dynamo.reset()
    inputs = make_inputs(reference=reference)
    compiled = torch.compile(lambda *t: call(inputs, *t) * 2, fullgraph=True, backend="aot_eager")
    tensors = leaves(inputs)
    got = compiled(*tensors)
    expected = call(inputs, *tensors) * 2
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_dynamic_shapes():
    torch._dynamo.reset()

    def step(value, image, points, weights, references):
        return ms_deform_attn_step(value, [tuple(image.shape), (3, 2)], points, weights, references)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((6, 5), (7, 4), (9, 9)):
        inputs = make_inputs(shapes=[shape, (3, 2)]).cast(torch.float32)
        arguments = (inputs.value, torch.empty(shape), inputs.points, inputs.weights, inputs.reference)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(MSDeformAttn(32, 2, 4, 3) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(32) for _ in range(2))
        for layer in self.layers:  # they start blind to the query
            torch.nn.init.normal_(layer.sampling_offsets.weight)
            torch.nn.init.normal_(layer.attention_weights.weight)

    def forward(self, memory, references, images):
        shapes = [tuple(image.shape) for image in images]
        query = memory
        for layer, norm in zip(self.layers, self.norms):
            query = norm(query + layer(query, references, query, shapes))
        return query


def layers_inputs(shapes, n=2):
    cells = sum(h * w for h, w in shapes)
    return torch.randn(n, cells, 32), torch.rand(n, cells, len(shapes), 2), [torch.empty(shape) for shape in shapes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_a_model_of_two_layers(dynamic):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = TwoLayers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    frames = []
    # Sizes that are equal at first, to each other or to a constant, are taken to be so always.
    for shapes in [[(13, 17), (5, 7)], [(11, 9), (6, 4)], [(8, 12), (9, 9)]][: 3 if dynamic else 1]:
        inputs = layers_inputs(shapes, n=3)
        got, expected = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(got, expected)
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, "other image sizes must not compile again"


class Step(torch.nn.Module):
    shapes = ((6, 5), (3, 2))

    def forward(self, value, points, weights, references):
        return ms_deform_attn_step(value, self.shapes, points, weights, references)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_nothing_custom(strict):
    if strict and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("before PyTorch 2.7 nothing tells strict export from torch.compile")
    tensors = make_inputs().cast(torch.float32).tensors
    exported = torch.export.export(Step(), tuple(tensors), strict=strict)
    assert not [node for node in exported.graph.nodes if "ddetr" in str(node.target)]
    torch.testing.assert_close(exported.module()(*tensors), Step()(*tensors))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trace_holds_nothing_custom():
    tensors = make_inputs().cast(torch.float32).tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(Step(), tuple(tensors))
    assert "ddetr::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*tensors), Step()(*tensors))


@REFERENCES
def test_autocast_casts_nothing(reference):
    inputs = make_inputs(reference=reference, dtype=torch.bfloat16)
    output, grad_output, grads = truth(inputs)
    tensors = leaves(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(inputs, *tensors)
        assert got.dtype == torch.float32
        assert relative_error(got.detach(), output) < 1e-5
        low = call(inputs, tensors[0].bfloat16(), *tensors[1:])
        assert low.dtype == torch.bfloat16
        assert relative_error(low.detach(), output) < 4e-3
        got_grads = torch.autograd.grad(got, tensors, grad_output.float())
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(got_grads, grads))


def test_a_module_under_autocast(monkeypatch):
    """Linear layers give bfloat16; locations are computed in float32 all the same: on a level of 128 cells a location
    in bfloat16 would be off by a quarter of a cell.
    """
    steps = []

    def step(*arguments):
        steps.append((arguments, ms_deform_attn_step(*arguments)))
        return steps[-1][1]

    model, shapes = TwoLayers(), [(128, 2), (2, 128)]
    inputs = layers_inputs(shapes)
    expected = model(*inputs)
    monkeypatch.setattr(attention, "ms_deform_attn_step", step)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*inputs)
    assert len(steps) == 2
    for (value, _, offsets, logits, references), output in steps:
        assert {value.dtype, offsets.dtype, logits.dtype, output.dtype} == {torch.bfloat16}
        assert references.dtype == torch.float32
        doubles = [t.detach().double() for t in (value, offsets, logits, references)]
        exact = attention_step_reference(doubles[0], shapes, *doubles[1:])
        assert relative_error(output.detach(), exact) < 4e-3
    assert (got - expected).abs().mean() < 0.03
    got.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_inference_mode_and_no_grad():
    inputs = make_inputs()
    tensors = leaves(inputs)
    with torch.inference_mode():
        inside = call(inputs, *tensors)
    with torch.no_grad():
        assert torch.equal(call(inputs, *tensors), inside)
    assert torch.equal(call(inputs, *tensors).detach(), inside)


def test_fake_and_meta_tensors():
    inputs = make_inputs(n=2, m=4, d=8, q=7)
    tensors = [t.detach().to("meta") for t in inputs.tensors]
    assert call(inputs, *tensors).shape == (2, 7, 32)
    real = inputs.cast(torch.float32).tensors
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in real]
        assert call(inputs, *fakes).shape == (2, 7, 32)


WRONG = {
    "value of three dimensions": (
        {"value": torch.zeros(1, 36, 16)},
        r"value must be \(N, S, M, D\), got \(1, 36, 16\)",
    ),
    "cells": ({"shapes": [(6, 5), (3, 3)]}, "hold 39 cells, but value has S=36"),
    "no cells": ({"shapes": [(6, 6), (0, 2)]}, r"spatial_shapes \[\(6, 6\), \(0, 2\)\] hold 36 cells"),
    "levels": ({"shapes": [(6, 6)]}, "L=1 as in value and spatial_shapes"),
    "not pairs": ({"shapes": [6, 5, 3, 2]}, "must be a list of"),
    "a tensor of shapes": ({"shapes": torch.tensor([(6, 5), (3, 2)])}, "tolist"),
    "heads": ({"points": torch.zeros(1, 9, 3, 2, 4, 2)}, "M=2"),
    "last dimension of points": ({"points": torch.zeros(1, 9, 2, 2, 4, 3)}, r"must be \(N, Q, M, L, P, 2\)"),
    "weights": ({"weights": torch.zeros(1, 9, 2, 2, 3)}, r"must be \(1, 9, 2, 2, 4\) as sampling_"),
    "references": ({"reference": torch.zeros(1, 9, 2, 3)}, r"reference_points must be .* got \(1, 9, 2, 3\)"),
    "references of other queries": ({"reference": torch.zeros(1, 8, 2, 2)}, "reference_points must be"),
    "integers": ({"value": torch.zeros(1, 36, 2, 8, dtype=torch.int64)}, "value must be floating point"),
    "integer points": ({"points": torch.zeros(1, 9, 2, 2, 4, 2, dtype=torch.int32)}, "must be floating point"),
    "devices": ({"value": torch.zeros(1, 36, 2, 8, device="meta")}, "value is on meta but sampling_"),
}


@pytest.mark.parametrize("reference", [0, 2])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change, message, reference):
    if "reference" in change and not reference:
        pytest.skip("the plain function has no reference points")
    with pytest.raises(ValueError, match=message):
        call(make_inputs(reference=reference).cast(torch.float32)._replace(**change))


def test_the_operator_checks_for_itself():
    # Compiled code and direct callers do not pass through the public functions; raw pointers forgive nothing.
    inputs = make_inputs(reference=2).cast(torch.float32)
    tensors = (inputs.points, inputs.weights, inputs.reference)
    with pytest.raises(ValueError, match="hold 42 cells"):
        torch.ops.ddetr.ms_deform_attn(inputs.value, [6, 6, 3, 2], *tensors)
    with pytest.raises(ValueError, match="hold 42 cells"):
        torch.ops.ddetr.ms_deform_attn_backward(torch.zeros(1, 9, 16), inputs.value, [6, 6, 3, 2], *tensors, True)
    with pytest.raises(ValueError, match="grad_output must be"):
        torch.ops.ddetr.ms_deform_attn_backward(torch.zeros(1, 9, 15), inputs.value, inputs.flat, *tensors, True)
