"""From what was tried on the devices to rows."""

from itertools import groupby

from ddetr.doctor.causes import Cause
from ddetr.doctor.cures import installing
from ddetr.doctor.facts import Facts, Step
from ddetr.doctor.rows import Row, broken, ok

SECTION = "Tried"
_REFERENCE = "export DDETR_OPS=reference goes on with plain PyTorch"


def check_trial(facts: Facts) -> list[Row]:
    """A row for each device on which everything works; else one for each step that does not."""
    rows = []
    for device, steps in groupby(facts.steps or [], key=lambda step: step.device):
        done = list(steps)
        if passed := [step for step in done if step.passed]:
            text = "; ".join(f"{step.name} ({step.detail})" if step.detail else step.name for step in passed)
            if device == "cpu" and facts.gpus and not facts.cpu:
                text += "; the GPUs are not tried before the above is repaired"
            rows.append(ok(SECTION, device, text))
        rows.extend(_failed(step, facts) for step in done if not step.passed)
    return rows


def _failed(step: Step, facts: Facts) -> Row:
    text = f"{step.name} fails: {step.detail}"
    if step.name == "all-reduce":
        to_do = (
            "NCCL_DEBUG=INFO ddetr doctor shows more; NCCL_P2P_DISABLE=1 helps where GPUs cannot reach each other; "
            "docker run --shm-size=8g --ulimit memlock=-1 where shared memory is small; until then train on one: "
            "CUDA_VISIBLE_DEVICES=0"
        )
        return broken(SECTION, step.device, text, to_do, Cause.NCCL)
    if step.name == "nms":
        version = (facts.pytorch.version or "").partition("+")[0]
        command = f"uv pip install --reinstall --torch-backend=auto torch=={version} torchvision"
        to_do = f"torchvision has no kernels for the GPU: {installing(facts, command)}"
        return broken(SECTION, step.device, text, to_do, Cause.TORCHVISION)
    if step.name == "operator":
        to_do = _REFERENCE
        if step.device == "cpu":
            to_do = f"{installing(facts, 'build the CPU kernels anew (pip install -e .)')}; {_REFERENCE}"
        return broken(SECTION, step.device, text, to_do, Cause.OPERATOR)
    return broken(SECTION, step.device, text, _of_computation(step), Cause.COMPUTATION)


def _of_computation(step: Step) -> str:
    index = step.device.partition(":")[2]
    if any(word in step.detail.lower() for word in ("out of memory", "busy or unavailable")):
        return f"another program holds the GPU or its memory: nvidia-smi -i {index} names it"
    if "no answer" in step.detail:
        return (
            f"see whether another program keeps it busy: nvidia-smi -i {index}; a GPU that hangs needs a reboot of "
            "the host"
        )
    others = "leave it out: CUDA_VISIBLE_DEVICES=<the others>"
    return (
        f"look for faults of the card: nvidia-smi -q -i {index} | grep -A8 -i ecc; sudo dmesg | grep -i xid; reboot "
        f"the host; if it stays, {others}"
    )
