"""The choice of a back end: DDETR_OPS, the fallbacks, the self-test."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddetr.ops
from ddetr.ops import backends, embedding_bag, ms_deform_attn, ms_deform_attn_step
from ddetr.ops.native import library
from ddetr.ops.self_test import SelfTestError, self_test

choice = sys.modules["ddetr.ops.backends"]  # the name in the package is the function


@pytest.fixture
def fresh(monkeypatch):
    """The choice not made yet, made again after the test; sets DDETR_OPS."""

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
    monkeypatch.setattr(choice, "self_test", lambda module, device: self_test(module, torch.device("cpu")))
    assert choice.chosen_backend("cuda") == "triton"
    assert choice.verified_backend(torch.device("cuda", 0)) is embedding_bag
    assert choice.chosen_backend("cuda") == "reference"
    assert choice.uses_reference("cuda")
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "triton back end of ms_deform_attn failed its self-test on cuda:0" in warning
    assert "no kernel image is available" in warning


def test_importing_needs_torch_alone():
    heavy = "torchvision lightning timm scipy transformers triton matplotlib PIL torch._dynamo"
    code = f"import ddetr.ops, sys\nassert not (loaded := set({heavy!r}.split()) & set(sys.modules)), loaded"
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
