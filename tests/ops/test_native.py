"""The native library beyond its values: threads, fork, determinism, instruction sets, the build."""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from attention_inputs import make_inputs, relative_error, truth

from ddetr.ops.native import build, library

try:
    library.load()
except library.NativeUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Large enough that the kernel takes more than one thread, and that heads are split (fewer heads than threads).
BIG = {
    "packed": {"n": 1, "m": 2, "d": 32, "shapes": [(24, 25), (12, 13)], "p": 4, "q": 756},
    "packed, many heads": {"n": 3, "m": 4, "d": 16, "shapes": [(20, 20)], "p": 8, "q": 400},
    "direct": {"n": 1, "m": 4, "d": 32, "shapes": [(60, 60)], "p": 4, "q": 300},
}


@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("case", BIG.values(), ids=BIG)
def test_any_number_of_threads(threads, case, reference):
    inputs = make_inputs(**case, reference=reference)
    output, grad_output, grads = truth(inputs)
    value, points, weights, references = inputs.cast(torch.float32)[1:]
    arguments = (value, inputs.flat, points, weights, references)
    outputs = []
    for count in (1, 2, 3, 7, 32):
        threads(count)
        outputs.append(library.forward(*arguments))
        first = library.backward(grad_output.float(), *arguments)
        again = library.backward(grad_output.float(), *arguments)
        for a, b, expected in zip(first, again, grads):
            assert relative_error(a, expected) < 2e-5
            assert torch.equal(a, b), "the backward must give the same bits in every run"
    assert relative_error(outputs[0], output) < 1e-5
    assert all(torch.equal(outputs[0], other) for other in outputs), "the forward must not depend on the threads"


def test_called_from_several_threads_at_once(threads):
    threads(3)
    inputs = make_inputs(**BIG["packed"]).cast(torch.float32)
    arguments = (inputs.value, inputs.flat, inputs.points, inputs.weights, inputs.reference)
    expected = library.forward(*arguments)
    expected_grads = library.backward(expected, *arguments)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(library.forward(*arguments), expected):
                wrong.append("output")
            if not all(map(torch.equal, library.backward(expected, *arguments), expected_grads)):
                wrong.append("gradients")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_process_starts_its_own_threads():
    code = """
import os, signal, torch
from ddetr.ops.native import library
torch.set_num_threads(4)
value, points, weights = torch.rand(2, 400, 4, 32), torch.rand(2, 400, 4, 1, 4, 2), torch.rand(2, 400, 4, 1, 4)
expected = library.forward(value, [20, 20], points, weights, None)
child = os.fork()
if child == 0:
    signal.alarm(30)
    same = all(torch.equal(library.forward(value, [20, 20], points, weights, None), expected) for _ in range(5))
    os._exit(0 if same else 3)
assert torch.equal(library.forward(value, [20, 20], points, weights, None), expected)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="one instruction set here")
@pytest.mark.parametrize("isa", ["sse4", "avx2"])
def test_every_instruction_set(isa):
    code = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from attention_inputs import make_inputs, relative_error, truth
from ddetr.ops.native import library
order = ["sse4", "avx2", "avx512"]
assert order.index(library.isa()) <= order.index({isa!r}), library.isa()
for d in (7, 8, 12, 32, 64):
    for q in (4, 70):
        for reference in (0, 2, 4):
            for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3)):
                inputs = make_inputs(d=d, q=q, p=3, reference=reference, dtype=torch.bfloat16)
                output, grad_output, grads = truth(inputs)
                value, points, weights, references = inputs.cast(dtype)[1:]
                arguments = (value, inputs.flat, points, weights, references)
                assert relative_error(library.forward(*arguments), output) < tolerance
                for got, grad in zip(library.backward(grad_output.to(dtype), *arguments), grads):
                    assert relative_error(got, grad) < tolerance, (d, q, reference, dtype)
"""
    environment = {**os.environ, "DDETR_OPS_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


def test_offsets_beyond_32_bits():
    """Two images far apart in one large allocation that is never touched in between (int64 strides)."""
    far = 2**31 // 4 + 1000  # floats: more than 2**31 bytes
    try:
        storage = torch.empty(far + 36 * 8)
    except RuntimeError:
        pytest.skip("no address space for 2 GiB")
    value = storage.as_strided((2, 36, 1, 8), (far, 8, 8, 1))
    value.normal_(generator=torch.Generator().manual_seed(0))
    points, weights = torch.rand(2, 5, 1, 1, 4, 2), torch.rand(2, 5, 1, 1, 4)
    got = library.forward(value, [6, 6], points, weights, None)
    assert torch.equal(got, library.forward(value.contiguous(), [6, 6], points, weights, None))


def test_a_stale_library_is_refused(monkeypatch):
    monkeypatch.setattr(library, "source_id", lambda: "0" * 16)
    with pytest.raises(library.NativeUnavailableError, match="built from other sources: build it again"):
        library.load.__wrapped__()


def test_build_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "compilers", lambda *_: [])
    with pytest.raises(build.BuildError, match="no compiler for linux-aarch64 here: pip install ziglang"):
        build.build("linux-aarch64", tmp_path / "msda.so")


@pytest.mark.skipif(platform.system() == "Windows", reason="needs a command that fails")
def test_build_that_fails_says_why(monkeypatch, tmp_path):
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho 'error: out of ideas' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(build, "compilers", lambda *_: [[str(script)], [str(tmp_path / "absent")]])
    with pytest.raises(build.BuildError, match="out of ideas") as raised:
        build.build(output=tmp_path / "msda.so")
    assert "absent" in str(raised.value)
    assert not (tmp_path / "msda.so").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", build.TARGETS)
def test_cross_compilation(name, tmp_path):
    pytest.importorskip("ziglang")
    path = tmp_path / build.library_path(name).name
    assert build.build(name, path).portable
    assert path.stat().st_size > 20_000
