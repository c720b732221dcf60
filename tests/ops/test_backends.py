"""The choice of a back end: DDETR_OPS, the fallbacks, the self-test."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ddetr.ops
from ddetr.ops import backends, embedding_bag, ms_deform_attn, ms_deform_attn_step, verified
from ddetr.ops.native import library
from ddetr.ops.self_test import SelfTestError, self_test

choice = sys.modules["ddetr.ops.backends"]  # the name in the package is the function


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The choice not made yet, made again after the test, no self-test remembered; sets DDETR_OPS."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))

    def forget():
        choice.requested.cache_clear()
        choice._chosen.cache_clear()
        library.load.cache_clear()
        for memory in (choice._rejected, choice._plain_devices, choice._verified):
            memory.clear()

    forget()
    yield lambda name: monkeypatch.setenv("DDETR_OPS", name)
    forget()


def run_once():
    """A forward and backward; the name of the back end that computed."""
    tensors = [torch.rand(1, 36, 2, 8), torch.rand(1, 9, 2, 2, 4, 2), torch.rand(1, 9, 2, 2, 4), torch.rand(1, 9, 2, 2)]
    for tensor in tensors:
        tensor.requires_grad_()
    ms_deform_attn_step(tensors[0], [(6, 5), (3, 2)], *tensors[1:]).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
    (active,) = [row.name for row in backends() if row.active and row.device == "cpu"]
    return active


def test_backends_says_what_is_there_and_why_not():
    rows = {(row.device, row.name): row for row in backends()}
    assert rows["cpu", "reference"].available
    assert rows["cpu", "embedding_bag"].available
    for device in ("cpu", "cuda"):
        assert sum(row.active for row in rows.values() if row.device == device) == 1
    assert all(row.detail for row in rows.values())
    if not torch.cuda.is_available():
        assert not rows["cuda", "triton"].available
        assert rows["cuda", "reference"].active


@pytest.mark.parametrize("name", ["embedding_bag", "reference"])
def test_environment_variable(fresh, name):
    fresh(name)
    assert run_once() == name


def test_a_name_for_another_device_leaves_this_one_to_auto(fresh):
    fresh("triton")
    assert run_once() in ("native", "embedding_bag")


@pytest.mark.parametrize("name", ["auto", "native"])
def test_first_use_inside_activation_checkpointing(fresh, name):
    """What the self-test saves for its own gradients must not count among what the checkpointed part has saved."""
    if name == "native" and choice._problem("native"):
        pytest.skip("the native back end is not here")
    fresh(name)
    tensors = [torch.rand(1, 36, 2, 8), torch.rand(1, 9, 2, 2, 4, 2), torch.rand(1, 9, 2, 2, 4), torch.rand(1, 9, 2, 2)]
    for tensor in tensors:
        tensor.requires_grad_()
    shapes = [(6, 5), (3, 2)]
    output = checkpoint(lambda value, *rest: ms_deform_attn_step(value, shapes, *rest), *tensors, use_reentrant=False)
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)


def test_unknown_name(fresh):
    fresh("cuda")
    with pytest.raises(ValueError, match="DDETR_OPS=cuda is not a back end: choose one of auto, native"):
        run_once()


def test_without_the_library_embedding_bag_stands_in(fresh, monkeypatch):
    monkeypatch.setattr(library, "library_path", lambda: Path("lib/msda-nowhere.so"))
    assert run_once() == "embedding_bag"
    native = backends()[0]
    assert not native.available
    assert native.detail.startswith("no msda-nowhere.so in lib/: build it with `python -m ddetr.ops.native.build`")


def test_asking_for_the_library_without_it_is_an_error(fresh, monkeypatch):
    monkeypatch.setattr(library, "library_path", lambda: Path("lib/msda-nowhere.so"))
    fresh("native")
    with pytest.raises(RuntimeError, match="DDETR_OPS=native, but no msda-nowhere.so.*DDETR_OPS=reference"):
        run_once()


def test_a_file_that_is_no_library(fresh, monkeypatch, tmp_path):
    (tmp_path / "msda.so").write_text("nothing")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "msda.so")
    assert run_once() == "embedding_bag"
    assert "msda.so does not load here" in backends()[0].detail


class Wrong:
    """A back end that computes something else, as a library of another version or a broken driver might."""

    @staticmethod
    def forward(*arguments):
        return embedding_bag.forward(*arguments) * 1.001

    backward = staticmethod(embedding_bag.backward)


class Failing(Wrong):
    @staticmethod
    def forward(*arguments):
        raise RuntimeError("no kernel image is available for execution on the device")


def test_self_test():
    self_test(embedding_bag, torch.device("cpu"))
    with torch.inference_mode():
        self_test(embedding_bag, torch.device("cpu"))
    with pytest.raises(SelfTestError, match="the output is off by 1.0e-03"):
        self_test(Wrong, torch.device("cpu"))
    with pytest.raises(SelfTestError, match="no kernel image is available"):
        self_test(Failing, torch.device("cpu"))


def test_self_test_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    self_test(embedding_bag, torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("module", [Wrong, Failing])
def test_a_failed_self_test_raises_with_the_cure(fresh, monkeypatch, module):
    monkeypatch.setattr(choice, "_problem", lambda name: None)
    monkeypatch.setattr(choice, "_detail", lambda name: name)
    monkeypatch.setattr(choice, "_module", lambda name: module)
    with pytest.raises(RuntimeError, match="the native back end .* failed its self-test on cpu .*DDETR_OPS=reference"):
        run_once()


def test_cuda_falls_back_to_the_reference_with_one_warning(fresh, monkeypatch, caplog):
    monkeypatch.setattr(choice, "_problem", lambda name: None)
    monkeypatch.setattr(choice, "_module", lambda name: Failing)
    monkeypatch.setattr(choice, "_detail", lambda name: name)
    monkeypatch.setattr(verified, "self_test", lambda module, device: self_test(module, torch.device("cpu")))
    assert choice.chosen_backend("cuda") == "triton"
    assert choice.verified_backend(torch.device("cuda", 0)) is embedding_bag
    assert choice.chosen_backend("cuda") == "reference"
    assert choice.uses_reference("cuda")
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "triton back end of ms_deform_attn failed its self-test on cuda:0" in warning
    assert "no kernel image is available" in warning


def test_importing_and_using_needs_torch_alone():
    heavy = "torchvision lightning timm scipy transformers triton matplotlib PIL torch._dynamo sympy"
    code = f"""
import ddetr.ops, sys, torch
def check(when):
    assert not (loaded := set({heavy!r}.split()) & set(sys.modules)), (when, loaded)
check("import")
value = torch.rand(1, 36, 2, 8, requires_grad=True)
ddetr.ops.ms_deform_attn(value, [(6, 6)], torch.rand(1, 9, 2, 1, 4, 2), torch.rand(1, 9, 2, 1, 4)).sum().backward()
check("first use, with its self-test")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_compile_before_anything_was_chosen(fresh, name):
    torch._dynamo.reset()
    fresh(name)
    step = torch.compile(lambda v, p, w: ms_deform_attn(v, [(6, 6)], p, w), fullgraph=True, backend="eager")
    tensors = torch.rand(1, 36, 2, 8), torch.rand(1, 9, 2, 1, 4, 2), torch.rand(1, 9, 2, 1, 4)
    first, second = step(*tensors), step(*tensors)
    torch.testing.assert_close(first, ms_deform_attn(tensors[0], [(6, 6)], *tensors[1:]))
    torch.testing.assert_close(first, second)


def test_names():
    assert all(hasattr(ddetr.ops, name) for name in ddetr.ops.__all__)


class Breaking:
    """A back end that passes its self-test and fails later, as a kernel does on sizes that do not fit the device."""

    error = RuntimeError("Triton Error [CUDA]: invalid argument")

    @classmethod
    def forward(cls, value, *arguments):
        if value.shape[0] == 5:
            raise cls.error
        return embedding_bag.forward(value, *arguments)

    @classmethod
    def backward(cls, grad_output, *arguments):
        if (grad_output == 7).all():
            raise cls.error
        return embedding_bag.backward(grad_output, *arguments)


@pytest.fixture
def breaking(fresh, monkeypatch):
    monkeypatch.setattr(choice, "_module", lambda name: Breaking)
    monkeypatch.setattr(choice, "_problem", lambda name: None)
    value = torch.rand(5, 36, 2, 8, requires_grad=True)
    return lambda n: ms_deform_attn(value[:n], [(6, 6)], torch.rand(n, 9, 2, 1, 4, 2), torch.rand(n, 9, 2, 1, 4))


CURE = "RuntimeError: Triton Error .CUDA.: invalid argument; set DDETR_OPS=reference to go on"


def test_a_failure_to_launch_names_the_cure(breaking):
    with pytest.raises(RuntimeError, match=f"ms_deform_attn failed in .* on cpu: {CURE}") as raised:
        breaking(5)
    assert raised.value.__cause__ is Breaking.error
    output = breaking(1)
    with pytest.raises(RuntimeError, match=CURE):
        output.backward(torch.full_like(output, 7.0))


def test_an_error_of_the_kernel_names_the_cure(fresh, monkeypatch):
    if not backends()[0].available:
        pytest.skip("no native library")
    fresh("native")
    value = torch.rand(1, 36, 2, 8, requires_grad=True)
    points, weights = torch.rand(1, 9, 2, 1, 4, 2), torch.rand(1, 9, 2, 1, 4)
    output = ms_deform_attn(value, [(6, 6)], points, weights)
    broken = SimpleNamespace(msda_forward=lambda args: 1, msda_backward=lambda args: 77)
    with monkeypatch.context() as patch:
        patch.setattr(library, "load", lambda: broken)
        with pytest.raises(RuntimeError, match="out of memory for its scratch arrays; set DDETR_OPS=reference"):
            ms_deform_attn(value, [(6, 6)], points, weights)
        with pytest.raises(RuntimeError, match="the CPU kernel failed: 77; set DDETR_OPS=reference"):
            output.sum().backward()
    assert torch.equal(ms_deform_attn(value, [(6, 6)], points, weights), output)


def test_out_of_memory_stays_what_it_is(breaking, monkeypatch):
    monkeypatch.setattr(Breaking, "error", torch.OutOfMemoryError("CUDA out of memory"))  # programs catch it by type
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        breaking(5)


def test_nothing_is_logged_of_a_device_that_is_not_there(fresh, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level("INFO", "ddetr"):
        backends()
    assert caplog.messages
    assert not [message for message in caplog.messages if "on cuda" in message]
