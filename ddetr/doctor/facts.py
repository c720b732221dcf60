"""What is known of a machine: plain data, so that every fault can be written down in a test without having it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Machine:
    system: str = "Linux"
    kernel: str = ""
    python: str = ""
    executable: str = ""
    ddetr: str = ""
    cores: int | None = None
    wsl: bool = False
    # "docker", "podman", "kubernetes", "container" (another), or "" outside of one
    container: str = ""


@dataclass(kw_only=True)
class Hardware:
    """What the kernel shows of NVIDIA's GPUs, without any driver library."""

    gpus_on_pci: int | None = None  # None where the PCI bus cannot be seen
    pci_drivers: list[str] = field(default_factory=list)  # kernel drivers that hold them: nvidia, nouveau, vfio-pci
    kernel_module: str | None = None  # version of NVIDIA's loaded kernel module
    devices: list[str] = field(
        default_factory=list
    )  # /dev/nvidia0 ...; not /dev/dxg, which WSL has for graphics cards of every maker

    driver_folder: str | None = None  # where Google's Kubernetes puts the driver's libraries, if libcuda.so.1 is there

    @property
    def seen(self) -> bool:
        return bool(self.gpus_on_pci or self.kernel_module or self.devices)


@dataclass(kw_only=True)
class Gpu:
    name: str
    capability: str | None = None  # "8.6"
    memory_total: int | None = None  # bytes
    memory_free: int | None = None


@dataclass(kw_only=True)
class Driver:
    """What the driver's own libraries say: libcuda and NVML (libnvidia-ml)."""

    problem: str | None = None  # why the look at the driver itself did not finish
    libcuda: bool = False
    libcuda_error: str | None = None
    cuda: str | None = None  # the newest CUDA version that the driver supports: "12.4"
    cu_init: int | None = None  # CUresult of cuInit
    nvml: int | None = None  # nvmlReturn_t of nvmlInit; None without the library
    nvml_error: str | None = None
    version: str | None = None  # "550.54.15"
    gpus: list[Gpu] = field(default_factory=list)


@dataclass(kw_only=True)
class PyTorch:
    state: str = "missing"  # "missing", "fails" (to be imported) or "works"
    error: str | None = None
    version: str | None = None
    cuda: str | None = None  # the CUDA version that it was built for; None: built without
    hip: str | None = None
    architectures: list[str] = field(default_factory=list)  # sm_80 ..., compute_90 for PTX
    available: bool = False
    count: int = 0
    current: int | None = None
    name: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    cuda_error: str | None = None
    cudnn: str | None = None
    cudnn_error: str | None = None
    nccl: str | None = None
    triton: str | None = None
    torchvision: str | None = None
    torchvision_needs: str | None = None  # the torch that its package asks for: "==2.6.0"
    torchvision_fits: bool | None = None  # whether that is the one that is here
    torchvision_error: str | None = None
    nms_error: str | None = None


@dataclass(kw_only=True)
class Limits:
    shared_memory: int | None = None  # bytes of /dev/shm, None where there is none
    shared_memory_free: int | None = None
    open_files: int | None = None  # None: unlimited or unknown
    open_files_hard: int | None = None
    locked_memory: int | None = None  # bytes, None: unlimited or unknown
    c_compiler: str | None = None


@dataclass(kw_only=True)
class Folder:
    path: str
    asked_for: bool = False  # by an option, not by default
    exists: bool = False
    is_folder: bool = False
    mounted: bool = False  # a mount of its own
    readable: bool = False
    writable: bool = False
    entries: int | None = None
    free: int | None = None  # bytes
    error: str | None = None


@dataclass(kw_only=True)
class Step:
    """One thing that was tried on a device."""

    device: str
    name: str  # "allocation", "matrix product", "convolution", "nms", "operator", "all-reduce"
    passed: bool
    detail: str = ""


@dataclass(kw_only=True)
class Facts:
    machine: Machine = field(default_factory=Machine)
    hardware: Hardware = field(default_factory=Hardware)
    driver: Driver = field(default_factory=Driver)
    pytorch: PyTorch = field(default_factory=PyTorch)
    limits: Limits = field(default_factory=Limits)
    data: Folder | None = None
    output: Folder | None = None
    steps: list[Step] | None = None  # None: nothing was tried
    variables: dict[str, str] = field(default_factory=dict)  # environment variables that change what CUDA does
    cpu: bool = False  # no GPU is expected: none is looked at

    @property
    def gpus(self) -> list[Gpu]:
        """As PyTorch sees them, else as the driver does."""
        return self.pytorch.gpus or self.driver.gpus

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
