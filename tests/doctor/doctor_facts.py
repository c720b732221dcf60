"""Machines written down: a healthy one, from which every fault is a change of a field or two."""

from ddetr.doctor.facts import Driver, Facts, Folder, Gpu, Hardware, Limits, Machine, PyTorch, Step
from ddetr.doctor.versions import published

GIB = 2**30
A100 = Gpu(name="NVIDIA A100-SXM4-80GB", capability="8.0", memory_total=80 * GIB, memory_free=79 * GIB)


def gpu_facts(gpu: Gpu = A100, count: int = 1, variant: str = "cu124", container: str = "docker") -> Facts:
    """A machine with GPUs on which everything works, in our image of a variant."""
    built = published()["variants"][variant]
    steps = [
        Step(device=f"cuda:{index}", name=name, passed=True, detail="made up")
        for index in range(count)
        for name in ("allocation", "matrix product", "convolution", "operator", "nms")
    ]
    return Facts(
        machine=Machine(system="Debian GNU/Linux 13 (trixie), x86_64", python="3.13.5", container=container),
        hardware=Hardware(
            gpus_on_pci=count,
            pci_drivers=["nvidia"],
            kernel_module="570.86.10",
            devices=[f"/dev/nvidia{index}" for index in range(count)],
        ),
        driver=Driver(libcuda=True, cuda="12.8", cu_init=0, nvml=0, version="570.86.10", gpus=[gpu] * count),
        pytorch=PyTorch(
            state="works",
            version=f"{built['torch']}+{variant}",
            cuda=built["cuda"],
            architectures=built["architectures"],
            available=True,
            count=count,
            current=0,
            name=gpu.name,
            gpus=[gpu] * count,
            cudnn=built["cudnn"],
            nccl=built["nccl"],
            triton="3.2.0",
            torchvision=f"{built['torchvision']}+{variant}",
            torchvision_needs=f"=={built['torch']}",
            torchvision_fits=True,
        ),
        limits=Limits(shared_memory=8 * GIB, shared_memory_free=8 * GIB, open_files=65536, c_compiler="/usr/bin/cc"),
        data=Folder(path="/workspace/data", exists=True, is_folder=True, mounted=True, readable=True, entries=3),
        output=Folder(
            path="/workspace/output", exists=True, is_folder=True, readable=True, writable=True, free=200 * GIB
        ),
        steps=steps,
    )


def without_gpu(container: str = "") -> Facts:
    """A machine that never saw an NVIDIA GPU, in no container."""
    facts = gpu_facts(container=container)
    facts.hardware = Hardware(gpus_on_pci=0)
    facts.driver = Driver(libcuda_error="libcuda.so.1: cannot open shared object file", nvml_error="not there")
    facts.pytorch.available, facts.pytorch.count = False, 0
    facts.pytorch.current = facts.pytorch.name = None
    facts.pytorch.gpus = []
    facts.steps = [Step(device="cpu", name="operator", passed=True, detail="made up")]
    return facts
