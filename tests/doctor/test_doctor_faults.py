"""Every fault that the doctor knows: the cause it names, what it says is to be done, its exit code."""

from collections.abc import Callable

import pytest
from doctor_facts import A100, GIB, gpu_facts, without_gpu

from ddetr.doctor.causes import Cause, table
from ddetr.doctor.diagnosis import Diagnosis, check
from ddetr.doctor.facts import Driver, Facts, Gpu, Hardware, PyTorch, Step
from ddetr.doctor.rows import Row

RTX_5090 = Gpu(name="NVIDIA GeForce RTX 5090", capability="12.0", memory_total=32 * GIB)
B200 = Gpu(name="NVIDIA B200", capability="10.0", memory_total=180 * GIB)
K80 = Gpu(name="Tesla K80", capability="3.7", memory_total=12 * GIB)
V100 = Gpu(name="Tesla V100", capability="7.0", memory_total=16 * GIB)


def diagnosed(facts: Facts) -> Diagnosis:
    return Diagnosis(facts, check(facts))


def only_fault(facts: Facts, state: str = "broken") -> Row:
    """The one row that is not ok."""
    (row,) = [row for row in check(facts) if row.state != "ok"]
    assert row.state == state
    assert row.to_do
    assert "Traceback" not in row.text + row.to_do
    return row


def test_a_healthy_machine_has_nothing_to_report() -> None:
    diagnosis = diagnosed(gpu_facts(count=2))
    assert [row for row in diagnosis.rows if row.state != "ok"] == []
    assert (diagnosis.cause, diagnosis.exit_code) == (None, 0)
    sections = list(dict.fromkeys(row.section for row in diagnosis.rows))
    assert sections[0] == "PyTorch's own answer"
    assert [row.text for row in diagnosis.rows[:4]] == ["yes", "2", "0", A100.name]
    assert any(
        row.text.startswith("2 x NVIDIA A100-SXM4-80GB, compute capability 8.0 (sm_80)") for row in diagnosis.rows
    )


# --- no GPU, no driver


def test_no_gpu_at_all() -> None:
    facts = without_gpu()
    row = only_fault(facts)
    assert row.cause is Cause.NO_GPU
    assert "no NVIDIA GPU on the PCI bus" in row.text
    assert "ddetr doctor --cpu" in row.to_do
    assert "docker" not in row.to_do


def test_no_gpu_is_well_where_none_is_expected() -> None:
    facts = without_gpu()
    facts.cpu = True
    assert [row for row in check(facts) if row.state != "ok"] == []


def test_no_gpu_to_be_seen_in_a_container() -> None:
    row = only_fault(without_gpu("podman"))
    assert row.cause is Cause.NO_GPU
    assert "podman run --device nvidia.com/gpu=all" in row.to_do


@pytest.mark.parametrize(
    ("container", "command"),
    [
        ("docker", "docker run --gpus all"),
        ("podman", "--device nvidia.com/gpu=all"),
        ("kubernetes", "nvidia.com/gpu: 1"),
        ("container", "docker run --gpus all"),
    ],
)
def test_a_container_started_without_gpus(container: str, command: str) -> None:
    facts = without_gpu(container)
    facts.hardware = Hardware(gpus_on_pci=4, pci_drivers=["nvidia"], kernel_module="550.54.15")
    row = only_fault(facts)
    assert row.cause is Cause.CONTAINER_WITHOUT_GPUS
    assert "4 NVIDIA GPU(s), but the container was started without" in row.text
    assert command in row.to_do


@pytest.mark.parametrize("devices", [["/dev/nvidia0"], []])
def test_a_pod_whose_driver_is_not_in_the_library_path(devices: list[str]) -> None:
    """Google's Kubernetes mounts the driver into a folder of its own."""
    facts = without_gpu("kubernetes")
    facts.hardware = Hardware(devices=devices, driver_folder="/usr/local/nvidia/lib64")
    row = only_fault(facts)
    assert row.cause is Cause.NO_DRIVER
    assert row.to_do.startswith("export LD_LIBRARY_PATH=/usr/local/nvidia/lib64 ")


@pytest.mark.parametrize("devices", [[], ["/dev/nvidia0"]])
@pytest.mark.parametrize(
    ("container", "needed"),
    [
        ("docker", "sudo nvidia-ctk runtime configure --runtime=docker"),
        ("podman", "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"),
        ("kubernetes", "device plugin"),
    ],
)
def test_each_kind_of_container_gets_its_own_commands(container: str, needed: str, devices: list[str]) -> None:
    """Without devices, and with devices but no libraries."""
    facts = without_gpu(container)
    facts.hardware = Hardware(gpus_on_pci=1, kernel_module="550.54.15", devices=devices)
    to_do = only_fault(facts).to_do
    assert needed in to_do
    assert ("docker" in to_do) is (container == "docker")


def test_a_container_whose_variable_leaves_the_gpus_out() -> None:
    facts = without_gpu("docker")
    facts.hardware = Hardware(gpus_on_pci=1, kernel_module="550.54.15")
    facts.variables = {"NVIDIA_VISIBLE_DEVICES": "void"}
    assert only_fault(facts).to_do.startswith("NVIDIA_VISIBLE_DEVICES=void leaves the GPUs out")


def test_a_container_with_devices_but_no_libraries() -> None:
    facts = without_gpu("docker")
    facts.hardware = Hardware(gpus_on_pci=1, kernel_module="550.54.15", devices=["/dev/nvidia0"])
    row = only_fault(facts)
    assert row.cause is Cause.NO_DRIVER
    assert "docker run --gpus all" in row.to_do
    assert "not as bare devices" in row.to_do
    facts.variables = {"NVIDIA_DRIVER_CAPABILITIES": "utility"}
    assert "lacks compute: set it to compute,utility" in only_fault(facts).to_do


def test_a_gpu_without_driver() -> None:
    facts = without_gpu()
    facts.hardware = Hardware(gpus_on_pci=1, pci_drivers=["nouveau"])
    row = only_fault(facts)
    assert row.cause is Cause.NO_DRIVER
    assert "the kernel driver nouveau holds the GPU" in row.text
    assert "sudo apt install nvidia-driver" in row.to_do


@pytest.mark.parametrize(("nvml", "cu_init"), [(9, 100), (None, 100), (9, 999)])
def test_a_kernel_module_that_is_not_loaded(nvml: int | None, cu_init: int) -> None:
    facts = without_gpu()
    facts.hardware = Hardware(gpus_on_pci=1)
    facts.driver = Driver(libcuda=True, cuda="12.4", cu_init=cu_init, nvml=nvml, nvml_error="Driver Not Loaded")
    row = only_fault(facts)
    assert row.cause is Cause.NO_DRIVER
    assert "sudo modprobe nvidia" in row.to_do


@pytest.mark.parametrize(("nvml", "cu_init"), [(999, 100), (999, 999), (9, 100), (4, 100)])
def test_a_container_that_lost_its_gpus(nvml: int, cu_init: int) -> None:
    """ "Failed to initialize NVML: Unknown Error" after systemctl daemon-reload: the devices are there, and are
    refused."""
    facts = without_gpu("docker")
    facts.hardware = Hardware(gpus_on_pci=1, kernel_module="550.54.15", devices=["/dev/nvidia0"])
    facts.driver = Driver(libcuda=True, cuda="12.4", cu_init=cu_init, nvml=nvml, nvml_error="Unknown Error")
    row = only_fault(facts)
    assert row.cause is Cause.CUDA_FAILS
    assert row.text.startswith("the driver runs (550.54.15), but this container may not open /dev/nvidia*")
    assert "Unknown Error" in row.text
    assert row.to_do.startswith("start the container anew")
    assert "ls -l /dev/nvidia*" in row.to_do
    assert not [word for word in LINUX_DRIVER if word in row.text + row.to_do]


@pytest.mark.parametrize(("devices", "text"), [(["/dev/nvidia0"], "this user may not open"), ([], "no /dev/nvidia0")])
def test_a_user_who_may_not_open_the_devices(devices: list[str], text: str) -> None:
    facts = without_gpu()
    facts.hardware = Hardware(gpus_on_pci=1, kernel_module="550.54.15", devices=devices)
    facts.driver = Driver(libcuda=True, cuda="12.4", cu_init=100, nvml=4, nvml_error="Insufficient Permissions")
    row = only_fault(facts)
    assert row.cause is Cause.CUDA_FAILS
    assert text in row.text
    assert "container" not in row.to_do
    assert not [word for word in LINUX_DRIVER if word in row.text + row.to_do]


LINUX_DRIVER = ("modprobe", "dkms", "ubuntu-drivers", "apt install nvidia", "rmmod", "mokutil", "fabricmanager")


def wsl(driver: Driver, container: str = "") -> Facts:
    facts = without_gpu(container)
    facts.machine.wsl, facts.hardware, facts.driver = True, Hardware(gpus_on_pci=0), driver
    return facts


@pytest.mark.parametrize("container", ["", "docker"])
@pytest.mark.parametrize(
    ("driver", "cause"),
    [
        (Driver(libcuda_error="libcuda.so.1: cannot open shared object file"), Cause.NO_GPU),
        (Driver(libcuda=True, cuda="12.4", cu_init=100, nvml=9), Cause.NO_GPU),
        (Driver(libcuda=True, cuda="12.4", cu_init=999, nvml=999), Cause.CUDA_FAILS),
        (Driver(libcuda=True, cuda="12.4", cu_init=500, nvml=9), Cause.CUDA_FAILS),
        (Driver(libcuda=True, cuda="12.4", cu_init=802, nvml=0), Cause.CUDA_FAILS),
        (Driver(libcuda=True, cu_init=803, nvml=18), Cause.DRIVER_MISMATCH),
        (Driver(problem="the process died (segmentation fault)"), Cause.CUDA_FAILS),
    ],
)
def test_wsl_needs_the_driver_of_windows(driver: Driver, cause: Cause, container: str) -> None:
    row = only_fault(wsl(driver, container))
    assert row.cause is cause
    assert "install NVIDIA's newest driver in Windows, then wsl --update" in row.to_do
    assert "Install no Linux driver inside WSL" in row.to_do
    assert not [word for word in LINUX_DRIVER if word in row.text + row.to_do]
    if cause is Cause.NO_GPU and container:
        assert row.to_do.startswith("start the container with it: docker run --gpus all")


def test_wsl_with_a_driver_that_is_old_or_slow() -> None:
    facts = gpu_facts(container="")
    facts.machine.wsl, facts.hardware = True, Hardware(gpus_on_pci=0)
    assert [row for row in check(facts) if row.state != "ok"] == []
    facts.driver.version, facts.driver.cuda = "471.11", "11.4"
    assert only_fault(facts).to_do.startswith("update NVIDIA's driver in Windows to one for CUDA 12.4 or newer")
    facts.driver = Driver(problem="no answer within 90 s")
    assert only_fault(facts, "warning").to_do == "update NVIDIA's driver in Windows"


def test_wsl_with_hidden_gpus() -> None:
    facts = wsl(Driver(libcuda=True, cuda="12.4", cu_init=100, nvml=0))
    facts.variables = {"CUDA_VISIBLE_DEVICES": "7"}
    assert only_fault(facts).cause is Cause.GPUS_HIDDEN


def test_driver_libraries_without_any_gpu() -> None:
    facts = without_gpu()
    facts.driver = Driver(libcuda=True, cuda="12.4", cu_init=100, nvml=9)
    row = only_fault(facts)
    assert row.cause is Cause.NO_GPU
    assert "libraries are installed, but there is no NVIDIA GPU" in row.text


@pytest.mark.parametrize(("nvml", "cu_init"), [(18, 803), (18, None), (None, 803)])
def test_a_driver_that_was_updated_under_a_running_kernel(nvml: int | None, cu_init: int | None) -> None:
    facts = without_gpu("docker")
    facts.hardware = Hardware(gpus_on_pci=1, kernel_module="550.54.14", devices=["/dev/nvidia0"])
    facts.driver = Driver(libcuda=True, nvml=nvml, nvml_error="Driver/library version mismatch", cu_init=cu_init)
    row = only_fault(facts)
    assert row.cause is Cause.DRIVER_MISMATCH
    assert "Driver/library version mismatch" in row.text
    assert "the kernel runs 550.54.14" in row.text
    assert row.to_do.startswith("reboot the host; then start this container anew")


@pytest.mark.parametrize(
    ("code", "text", "to_do"),
    [
        (34, "stub", "LD_LIBRARY_PATH"),
        (802, "NVSwitch", "nvidia-fabricmanager"),
        (804, "forward-compatibility", "cuda-compat"),
        (999, "unknown error", "nvidia_uvm"),
        (3, "cuInit returns 3", "dmesg"),
    ],
)
def test_a_driver_that_does_not_start(code: int, text: str, to_do: str) -> None:
    facts = gpu_facts()
    facts.driver.cu_init, facts.pytorch.available = code, False
    facts.pytorch.gpus, facts.pytorch.count = [], 0
    row = only_fault(facts)
    assert row.cause is Cause.CUDA_FAILS
    assert text in row.text
    assert to_do in row.to_do


def test_driver_libraries_that_crash() -> None:
    facts = without_gpu()
    facts.driver = Driver(problem="the process died (segmentation fault)")
    row = only_fault(facts)
    assert row.cause is Cause.CUDA_FAILS
    assert "segmentation fault" in row.text


def test_a_driver_that_is_slow_but_works() -> None:
    """Eight GPUs without persistence mode: PyTorch has its answer, the look at the driver ran out of time."""
    facts = gpu_facts(count=8)
    facts.driver = Driver(problem="no answer within 90 s", version="570.86.10", nvml=0)
    row = only_fault(facts, "warning")
    assert row.text.startswith("the driver answers slowly: no answer within 90 s")
    assert "nvidia-persistenced --persistence-mode" in row.to_do
    assert "systemctl enable --now nvidia-persistenced" in row.to_do
    assert diagnosed(facts).exit_code == 0
    facts.pytorch.available = False
    assert only_fault(facts).cause is Cause.CUDA_FAILS


def test_a_driver_library_that_crashes_beside_a_pytorch_that_works() -> None:
    facts = gpu_facts()
    facts.driver = Driver(problem="the process died (segmentation fault)", libcuda=True, cu_init=0, nvml=0)
    row = only_fault(facts, "warning")
    assert "CUDA starts" in row.text
    assert "slowly" not in row.text
    assert "segmentation fault" in row.text


def test_hidden_gpus() -> None:
    facts = gpu_facts()
    facts.driver.cu_init, facts.pytorch.available, facts.pytorch.count = 100, False, 0
    facts.variables = {"CUDA_VISIBLE_DEVICES": ""}
    row = only_fault(facts)
    assert row.cause is Cause.GPUS_HIDDEN
    assert "unset CUDA_VISIBLE_DEVICES" in row.to_do
    facts.driver.cu_init = 0  # libcuda counts what PyTorch does not
    assert only_fault(facts).cause is Cause.GPUS_HIDDEN


def test_some_gpus_are_hidden_on_purpose() -> None:
    facts = gpu_facts(count=4)
    facts.pytorch.count, facts.pytorch.gpus, facts.variables = 1, [A100], {"CUDA_VISIBLE_DEVICES": "2"}
    rows = check(facts)
    assert [row for row in rows if row.state != "ok"] == []
    assert "CUDA_VISIBLE_DEVICES=2 shows 1 of 4" in [row.text for row in rows]


def test_a_gpu_whose_memory_others_hold() -> None:
    facts = gpu_facts(count=2)
    facts.driver.gpus = [A100, Gpu(name=A100.name, capability="8.0", memory_total=80 * GIB, memory_free=2 * GIB)]
    row = only_fault(facts, "warning")
    assert "others hold 78 of 80 GiB of GPU 1" in row.text
    assert "nvidia-smi -i 1" in row.to_do


# --- the driver and this PyTorch


@pytest.mark.parametrize(
    ("variant", "driver", "cuda", "advice"),
    [
        ("cu124", "470.57.02", "11.4", "update the driver on the host to 550.54.15 or newer (at least 525.60.13)"),
        ("cu124", "525.60.11", "12.0", "at least 525.60.13"),
        ("cu126", "515.43.04", None, "make image VARIANT=cu118"),
        ("cu118", "440.33.01", "10.2", "at least 450.80.02"),
        ("cu124", None, "11.8", "update the driver"),
    ],
)
def test_a_driver_that_is_too_old(variant: str, driver: str | None, cuda: str | None, advice: str) -> None:
    facts = gpu_facts(variant=variant)
    facts.hardware.kernel_module = facts.driver.version = driver
    facts.driver.cuda = cuda
    facts.pytorch.available = False
    facts.pytorch.cuda_error = "The NVIDIA driver on your system is too old (found version 11040)."
    row = only_fault(facts)
    assert row.cause is Cause.DRIVER_TOO_OLD
    assert advice in row.to_do
    if variant == "cu124" and driver:
        assert f"driver {driver}, supports CUDA {cuda}; this PyTorch was built for CUDA 12.4" in row.text


@pytest.mark.parametrize(
    ("variant", "driver", "cuda"),
    [
        ("cu124", "525.60.13", "12.0"),
        ("cu124", "550.54.14", "12.4"),
        ("cu126", "550.54.15", "12.4"),
        ("cu118", "470.57.02", "11.4"),
        ("cu124", None, "12.2"),
    ],
)
def test_a_driver_between_the_minimum_and_that_of_the_toolkit(variant: str, driver: str | None, cuda: str) -> None:
    facts = gpu_facts(variant=variant)
    facts.hardware.kernel_module = facts.driver.version = driver
    facts.driver.cuda = cuda
    row = only_fault(facts, "warning")
    assert "minor-version compatibility" in row.text
    assert "Triton" in row.text
    assert "DDETR_OPS=reference" in row.to_do
    assert diagnosed(facts).exit_code == 0


@pytest.mark.parametrize(
    ("variant", "driver", "cuda"),
    [
        ("cu124", "550.54.15", "12.4"),
        ("cu124", "580.65.06", "13.0"),
        ("cu118", "525.60.13", "12.0"),
        ("cu126", "560.35.05", "12.6"),
        ("cu124", "470.57.02", "12.4"),  # with CUDA's forward-compatibility libraries
        ("cu124", None, "12.4"),
        ("cu124", None, None),
    ],
)
def test_a_driver_that_fits(variant: str, driver: str | None, cuda: str | None) -> None:
    facts = gpu_facts(variant=variant)
    facts.hardware.kernel_module = facts.driver.version = driver
    facts.driver.cuda = cuda
    assert [row for row in check(facts) if row.state != "ok"] == []


def test_a_toolkit_that_the_table_does_not_know_yet() -> None:
    facts = gpu_facts()
    facts.pytorch.cuda, facts.driver.version, facts.driver.cuda = "13.9", "570.86.10", "12.8"
    assert only_fault(facts).cause is Cause.DRIVER_TOO_OLD
    facts.driver.version, facts.driver.cuda = "595.45.04", "13.2"
    assert "CUDA 13.9" in only_fault(facts, "warning").text


@pytest.mark.parametrize(
    ("container", "driver", "cuda", "to_do"),
    [
        (
            "",
            "580.65.06",
            "13.0",
            "install a PyTorch with kernels for it: uv pip install --reinstall --torch-backend=cu130 torch==2.14.1 "
            "torchvision==0.29.1 (the image: make image VARIANT=cu130)",
        ),
        (
            "",
            "570.86.10",
            "12.8",
            "install a PyTorch with kernels for it: uv pip install --upgrade --torch-backend=cu128 torch torchvision",
        ),
        ("docker", "580.65.06", "13.0", "build the image with another variant: make image VARIANT=cu130"),
        (
            "docker",
            "570.86.10",
            "12.8",
            "update the driver on the host to 580.65.06 or newer, and build the image with another variant: make image "
            "VARIANT=cu130",
        ),
        (
            "docker",
            None,
            "12.8",
            "update the driver on the host to 580.65.06 or newer, and build the image with another variant: make image "
            "VARIANT=cu130",
        ),
        ("docker", None, None, "build the image with another variant: make image VARIANT=cu130"),
    ],
)
@pytest.mark.parametrize("gpu", [RTX_5090, B200])
def test_blackwell_with_the_cuda_12_4_build(
    gpu: Gpu, container: str, driver: str | None, cuda: str | None, to_do: str
) -> None:
    facts = gpu_facts(gpu, container=container)
    facts.hardware.kernel_module = facts.driver.version = driver
    facts.driver.cuda = cuda
    row = only_fault(facts)
    assert row.cause is Cause.GPU_TOO_NEW
    assert f"{gpu.name} (sm_{gpu.capability.replace('.', '')}) is newer than this PyTorch" in row.text
    assert "kernels for sm_50 to sm_90" in row.text
    assert "'no kernel image is available'" in row.text
    assert row.to_do == to_do


@pytest.mark.parametrize("gpu", [RTX_5090, B200, A100])
def test_todays_pytorch_serves_it(gpu: Gpu) -> None:
    facts = gpu_facts(gpu, variant="cu130")
    facts.hardware.kernel_module = facts.driver.version = "580.65.06"
    facts.driver.cuda = "13.0"
    assert [row for row in check(facts) if row.state != "ok"] == []


@pytest.mark.parametrize(
    ("gpu", "other"),
    [
        (A100, "; or build the image with another variant: make image VARIANT=cu124"),
        (
            RTX_5090,
            "; or outside the container (no image of ddetr has one for this GPU and driver): pip install . into an "
            "environment with PyTorch 2.7 or later for CUDA 12.8",
        ),
    ],
)
def test_a_driver_that_is_too_old_for_todays_pytorch(gpu: Gpu, other: str) -> None:
    facts = gpu_facts(gpu, variant="cu130")
    facts.pytorch.available = False
    row = only_fault(facts)
    assert row.cause is Cause.DRIVER_TOO_OLD
    assert row.to_do == "update the driver on the host to 580.65.06 or newer" + other


def test_a_gpu_that_is_newer_than_all_that_is_known() -> None:
    future = Gpu(name="NVIDIA Future", capability="19.0")
    assert "pip install --upgrade torch" in only_fault(gpu_facts(future, container="")).to_do
    assert only_fault(gpu_facts(future)).to_do == (
        "outside the container: pip install . into an environment with a newer PyTorch"
    )


def test_a_gpu_that_only_the_cuda_11_8_build_serves() -> None:
    row = only_fault(gpu_facts(K80))
    assert row.cause is Cause.GPU_TOO_OLD
    assert "Tesla K80 (sm_37) is older than this PyTorch" in row.text
    assert row.to_do == (
        "build the image with another variant: make image VARIANT=cu118 TORCH_INDEX=<PyTorch's own index of it>"
    )
    assert "uv pip install --reinstall --torch-backend=cu118" in only_fault(gpu_facts(K80, container="")).to_do
    assert [row for row in check(gpu_facts(K80, variant="cu118")) if row.state != "ok"] == []


def test_a_gpu_that_no_build_serves() -> None:
    row = only_fault(gpu_facts(Gpu(name="GTX 680", capability="3.0")))
    assert row.cause is Cause.GPU_TOO_OLD
    assert "or a newer GPU" in row.to_do


@pytest.mark.parametrize("container", ["", "docker"])
def test_a_gpu_that_a_newer_pytorch_has_dropped(container: str) -> None:
    """The default variant, which is locked and tested, comes first."""
    facts = gpu_facts(V100, container=container)
    facts.driver.version, facts.driver.cuda, facts.pytorch.cuda = "580.65.06", "13.0", "13.0"
    facts.pytorch.architectures = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    row = only_fault(facts)
    assert row.cause is Cause.GPU_TOO_OLD
    assert "make image VARIANT=cu124" in row.to_do


def test_a_gpu_that_is_served_by_ptx_only() -> None:
    facts = gpu_facts(RTX_5090)
    facts.pytorch.architectures = ["sm_80", "sm_90", "compute_90"]
    row = only_fault(facts, "warning")
    assert "the driver compiles them at first use" in row.text


GT_710 = Gpu(name="NVIDIA GeForce GT 710", capability="3.5", memory_total=2 * GIB)
RTX_3090 = Gpu(name="NVIDIA GeForce RTX 3090", capability="8.6", memory_total=24 * GIB)


@pytest.mark.parametrize(
    ("gpus", "visible", "advice"),
    [
        ([RTX_3090, GT_710], None, "export CUDA_VISIBLE_DEVICES=0"),
        ([GT_710, RTX_3090, GT_710, RTX_3090], None, "export CUDA_VISIBLE_DEVICES=1,3"),
        ([RTX_3090, RTX_5090], None, "export CUDA_VISIBLE_DEVICES=0"),
        ([GT_710, RTX_3090], "2, GPU-5ba7", "export CUDA_VISIBLE_DEVICES=GPU-5ba7"),
    ],
)
def test_a_gpu_that_is_not_served_beside_others_that_are(gpus: list[Gpu], visible: str | None, advice: str) -> None:
    facts = gpu_facts(count=len(gpus))
    facts.pytorch.gpus = gpus
    facts.variables = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    row = only_fault(facts, "warning")
    assert "RTX 3090" not in row.text
    assert row.to_do.split(";")[0] == f"leave it out: {advice}"
    assert "use the CPU" not in row.to_do
    assert diagnosed(facts).exit_code == 0


def test_gpus_in_the_drivers_order_are_told_so() -> None:
    facts = gpu_facts(count=2)
    facts.pytorch.gpus, facts.driver.gpus = [], [GT_710, RTX_3090]
    to_do = only_fault(facts, "warning").to_do
    assert to_do.startswith("leave it out: export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1")


def test_two_gpus_of_which_none_is_served() -> None:
    facts = gpu_facts(count=2)
    facts.pytorch.gpus = [GT_710, RTX_5090]
    rows = [row for row in check(facts) if row.state != "ok"]
    assert [(row.state, row.cause) for row in rows] == [("broken", Cause.GPU_TOO_OLD), ("broken", Cause.GPU_TOO_NEW)]


# --- PyTorch and what goes with it


def test_no_pytorch() -> None:
    facts = without_gpu()
    facts.cpu, facts.steps, facts.machine.executable = True, None, "/opt/venv/bin/python"
    facts.pytorch = PyTorch(state="missing", error="ModuleNotFoundError: No module named 'torch'")
    row = only_fault(facts)
    assert row.cause is Cause.PYTORCH_MISSING
    assert "/opt/venv/bin/python" in row.text
    assert "uv pip install torch==2.6.0 torchvision==0.21.0" in row.to_do


@pytest.mark.parametrize(
    ("gpu", "driver", "pins", "image"),
    [
        (A100, "580.65.06", "torch==2.6.0 torchvision==0.21.0", "make image"),
        (K80, "580.65.06", "torch==2.6.0 torchvision==0.21.0", "make image"),  # the doctor then tells what it needs
        (B200, "580.65.06", "torch==2.14.1 torchvision==0.29.1", "make image VARIANT=cu130"),
        (B200, "570.86.10", "torch==2.6.0 torchvision==0.21.0", "make image"),  # the same
    ],
)
def test_no_pytorch_for_a_gpu(gpu: Gpu, driver: str, pins: str, image: str) -> None:
    facts = gpu_facts(gpu, container="")
    facts.steps, facts.pytorch, facts.driver.version = None, PyTorch(state="missing"), driver
    assert only_fault(facts).to_do == f"uv pip install {pins} (in the image ddetr is ready to run: {image})"
    facts.machine.container = "docker"
    assert only_fault(facts).to_do.endswith(f": {image}")


def test_no_pytorch_comes_before_no_gpu() -> None:
    facts = without_gpu()
    facts.pytorch = PyTorch(state="missing")
    assert diagnosed(facts).cause is Cause.PYTORCH_MISSING
    assert "nobody to ask" in check(facts)[0].text


@pytest.mark.parametrize(
    ("error", "path", "to_do"),
    [
        ("OSError: libcudnn.so.9: cannot open shared object file", "/usr/local/cuda/lib64", "unset LD_LIBRARY_PATH"),
        ("ImportError: libtorch.so: undefined symbol: ncclCommRegister", None, "uv pip install --reinstall torch"),
        ("ImportError: /lib/libc.so.6: version `GLIBC_2.28' not found", None, "use the image"),
        ("the process died (segmentation fault)", None, "install it anew"),
        ("the process died (killed, often for lack of memory)", None, "more memory"),
        ("no answer within 120 s", None, "-X importtime"),
    ],
)
def test_a_pytorch_that_cannot_be_imported(error: str, path: str | None, to_do: str) -> None:
    facts = gpu_facts(container="")
    facts.steps, facts.pytorch = None, PyTorch(state="fails", error=error)
    facts.variables = {"LD_LIBRARY_PATH": path} if path else {}
    row = only_fault(facts)
    assert row.cause is Cause.PYTORCH_IMPORT
    assert error in row.text
    assert to_do in row.to_do


def test_the_images_own_library_path_is_not_blamed() -> None:
    """It names Google's folder for the driver, which holds no other library."""
    facts = gpu_facts(container="")
    facts.steps, facts.pytorch = None, PyTorch(state="fails", error="ImportError: libtorch.so: undefined symbol: x")
    facts.variables = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
    assert "LD_LIBRARY_PATH" not in only_fault(facts).to_do


def test_a_cpu_only_pytorch_on_a_machine_with_a_gpu() -> None:
    facts = gpu_facts(container="")
    facts.pytorch.version, facts.pytorch.cuda, facts.pytorch.available = "2.6.0+cpu", None, False
    facts.pytorch.gpus, facts.pytorch.cudnn, facts.pytorch.nccl, facts.pytorch.triton = [], None, None, None
    row = only_fault(facts)
    assert row.cause is Cause.CPU_ONLY_BUILD
    assert "2.6.0+cpu was built without CUDA" in row.text
    assert "--torch-backend=auto" in row.to_do
    facts.machine.container = "docker"
    assert only_fault(facts).to_do == "build the image with another variant: make image VARIANT=cu124"


def test_a_cpu_only_pytorch_on_a_machine_without_gpu_is_well() -> None:
    facts = without_gpu()
    facts.cpu, facts.pytorch.cuda = True, None
    assert [row for row in check(facts) if row.state != "ok"] == []


def test_cuda_that_does_not_start_though_all_fits() -> None:
    facts = gpu_facts()
    facts.pytorch.available, facts.pytorch.cuda_error = False, "CUDA unknown error - this may be due to ..."
    row = only_fault(facts)
    assert row.cause is Cause.CUDA_FAILS
    assert "CUDA unknown error" in row.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"torchvision": "0.20.1", "torchvision_needs": "==2.5.1", "torchvision_fits": False}, "asks for torch==2.5.1"),
        ({"torchvision": "0.20.1", "torchvision_needs": None, "torchvision_fits": None}, "torchvision 0.21 does"),
        ({"torchvision": None, "torchvision_error": "it is not installed"}, "it is not installed"),
        (
            {"torchvision_error": "RuntimeError: operator torchvision::nms does not exist"},
            "operator torchvision::nms does not exist",
        ),
        ({"nms_error": "it kept the boxes [0] where 0 and 2 are right"}, "torchvision::nms does not work"),
    ],
)
def test_torchvision_that_does_not_go_with_pytorch(changes: dict[str, str | None], text: str) -> None:
    facts = gpu_facts(container="")
    for name, value in changes.items():
        setattr(facts.pytorch, name, value)
    row = only_fault(facts)
    assert row.cause is Cause.TORCHVISION
    assert text in row.text
    assert "torch==2.6.0 torchvision==0.21.*" in row.to_do


def test_a_broken_cudnn_and_a_missing_triton_are_warned_of() -> None:
    facts = gpu_facts()
    facts.pytorch.cudnn_error = "RuntimeError: cuDNN version incompatibility"
    assert "cuDNN version incompatibility" in only_fault(facts, "warning").text
    facts = gpu_facts()
    facts.pytorch.triton = None
    assert "slower" in only_fault(facts, "warning").text
    facts = gpu_facts()
    facts.limits.c_compiler, facts.machine.container = None, ""
    assert only_fault(facts, "warning").to_do == "sudo apt install gcc python3-dev"


def _cannot_be_imported(facts: Facts) -> None:
    facts.steps, facts.pytorch = None, PyTorch(state="fails", error="the process died (segmentation fault)")


def _with_ptx(facts: Facts) -> None:
    facts.pytorch.gpus, facts.pytorch.architectures = [RTX_5090], ["sm_80", "sm_90", "compute_90"]


INSTALLED_THINGS: dict[str, Callable[[Facts], None]] = {
    "driver": lambda facts: vars(facts.driver).update(version="470.57.02", cuda="11.4"),
    "too new": lambda facts: vars(facts.pytorch).update(gpus=[RTX_5090]),
    "too old": lambda facts: vars(facts.pytorch).update(gpus=[K80]),
    "one of two": lambda facts: vars(facts.pytorch).update(gpus=[A100, RTX_5090]),
    "PTX": _with_ptx,
    "missing": lambda facts: vars(facts).update(pytorch=PyTorch(state="missing"), steps=None),
    "import": _cannot_be_imported,
    "cpu-only": lambda facts: vars(facts.pytorch).update(cuda=None, available=False, gpus=[]),
    "torchvision": lambda facts: vars(facts.pytorch).update(torchvision_fits=False),
    "no torchvision": lambda facts: vars(facts.pytorch).update(torchvision=None),
    "nms": lambda facts: vars(facts).update(steps=[Step(device="cuda:0", name="nms", passed=False)]),
    "CPU kernel": lambda facts: vars(facts).update(steps=[Step(device="cpu", name="operator", passed=False)]),
    "cuDNN": lambda facts: vars(facts.pytorch).update(cudnn_error="RuntimeError: incompatible"),
    "Triton": lambda facts: vars(facts.pytorch).update(triton=None),
    "C compiler": lambda facts: vars(facts.limits).update(c_compiler=None),
}


@pytest.mark.parametrize("container", ["docker", "podman", "kubernetes", "container"])
@pytest.mark.parametrize("fault", INSTALLED_THINGS)
def test_nothing_is_to_be_installed_in_a_container(fault: str, container: str) -> None:
    """Its environment belongs to root, may be read-only, and has no uv."""
    facts = gpu_facts(container=container)
    INSTALLED_THINGS[fault](facts)
    (row,) = [row for row in check(facts) if row.state != "ok"]
    assert "make image" in row.to_do or "pip install . into an environment" in row.to_do, row
    assert not [word for word in ("uv pip", "pip install -e", "--upgrade", "sudo apt") if word in row.to_do], row


# --- limits and folders


@pytest.mark.parametrize(
    ("container", "cure"),
    [("docker", "docker run --shm-size=8g"), ("kubernetes", "emptyDir"), ("", "sudo mount -o remount")],
)
def test_dockers_default_of_shared_memory(container: str, cure: str) -> None:
    facts = gpu_facts(container=container)
    facts.limits.shared_memory = facts.limits.shared_memory_free = 64 * 2**20
    row = only_fault(facts, "warning")
    assert "/dev/shm has 64 MiB" in row.text
    assert "training then starts fewer, or none" in row.text
    assert cure in row.to_do
    facts.limits.shared_memory = facts.limits.shared_memory_free = 2 * GIB - 1
    assert only_fault(facts, "warning").name == "shared memory"
    facts.limits.shared_memory = facts.limits.shared_memory_free = 2 * GIB
    assert [row for row in check(facts) if row.state != "ok"] == []


def test_shared_memory_that_is_in_use() -> None:
    facts = gpu_facts()
    facts.limits.shared_memory_free = 10 * 2**20
    assert "ls -l /dev/shm" in only_fault(facts, "warning").to_do


def test_few_open_files() -> None:
    facts = gpu_facts()
    facts.limits.open_files, facts.limits.open_files_hard = 1024, 524288
    assert only_fault(facts, "warning").to_do == "ulimit -n 524288"
    facts.limits.open_files_hard = 1024
    assert "--ulimit nofile" in only_fault(facts, "warning").to_do


@pytest.mark.parametrize(
    ("changes", "cause", "text"),
    [
        ({"exists": False, "is_folder": False, "asked_for": True}, Cause.DATA, "there is no folder /workspace/data"),
        ({"exists": False, "is_folder": False}, None, "there is no folder"),
        (
            {"readable": False, "error": "Permission denied"},
            Cause.DATA,
            "cannot be read by this user (Permission denied)",
        ),
        ({"is_folder": False}, Cause.DATA, "is a file"),
        ({"entries": 0}, None, "is empty"),
        ({"writable": True}, None, "can change or delete your data"),
    ],
)
def test_data(changes: dict[str, object], cause: Cause | None, text: str) -> None:
    facts = gpu_facts()
    for name, value in changes.items():
        setattr(facts.data, name, value)
    row = only_fault(facts, "broken" if cause else "warning")
    assert row.cause is cause
    assert text in row.text


def test_data_that_can_be_written_to_is_normal_outside_of_containers() -> None:
    facts = gpu_facts(container="")
    assert facts.data is not None
    facts.data.writable = True
    assert [row for row in check(facts) if row.state != "ok"] == []


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"free": 100 * 2**20}, "broken", "100 MiB free: the disk is full"),
        ({"free": 5 * GIB}, "warning", "5.0 GiB free: little"),
        ({"writable": False}, "broken", "cannot be written to"),
        ({"is_folder": False}, "broken", "is a file"),
    ],
)
def test_output(changes: dict[str, object], state: str, text: str) -> None:
    facts = gpu_facts()
    for name, value in changes.items():
        setattr(facts.output, name, value)
    row = only_fault(facts, state)
    assert row.cause is (Cause.OUTPUT if state == "broken" else None)
    assert text in row.text
    assert "--output FOLDER" in row.to_do


# --- what was tried


@pytest.mark.parametrize(
    ("step", "detail", "cause", "to_do"),
    [
        ("allocation", "OutOfMemoryError: CUDA out of memory.", Cause.COMPUTATION, "nvidia-smi -i 1 names it"),
        ("allocation", "CUDA-capable device(s) is/are busy or unavailable", Cause.COMPUTATION, "nvidia-smi -i 1"),
        ("matrix product", "the product in tf32 is off by 3.1e-01", Cause.COMPUTATION, "dmesg | grep -i xid"),
        ("convolution", "no answer within 300 s", Cause.COMPUTATION, "reboot of the host"),
        ("operator", "the gradient of value is off by 1.0e+00", Cause.OPERATOR, "export DDETR_OPS=reference"),
        ("operator", "the process died (segmentation fault)", Cause.OPERATOR, "export DDETR_OPS=reference"),
        ("nms", "NotImplementedError: Could not run 'torchvision::nms'", Cause.TORCHVISION, "torchvision"),
    ],
)
def test_a_step_that_fails_on_one_of_two_gpus(step: str, detail: str, cause: Cause, to_do: str) -> None:
    facts = gpu_facts(count=2)
    facts.steps = [
        Step(device="cuda:0", name=step, passed=True),
        Step(device="cuda:1", name=step, passed=False, detail=detail),
    ]
    row = only_fault(facts)
    assert (row.name, row.cause) == ("cuda:1", cause)
    assert detail in row.text
    assert to_do in row.to_do


def test_the_operator_is_wrong_on_the_cpu() -> None:
    facts = without_gpu()
    facts.cpu = True
    facts.steps = [Step(device="cpu", name="operator", passed=False, detail="the output is off by 2.0e-01")]
    row = only_fault(facts)
    assert row.cause is Cause.OPERATOR
    assert "build the CPU kernels anew" in row.to_do


def test_gpus_that_cannot_exchange_data() -> None:
    facts = gpu_facts(count=2)
    assert facts.steps is not None
    facts.steps.append(Step(device="2 GPUs", name="all-reduce", passed=False, detail="no answer within 300 s"))
    row = only_fault(facts)
    assert row.cause is Cause.NCCL
    assert "NCCL_P2P_DISABLE=1" in row.to_do


# --- the whole


def test_the_most_fundamental_cause_wins() -> None:
    facts = gpu_facts(RTX_5090)
    facts.steps = [Step(device="cpu", name="operator", passed=False)]
    facts.pytorch.torchvision_fits = False
    facts.limits.shared_memory = 0
    diagnosis = diagnosed(facts)
    assert {row.cause for row in diagnosis.rows} == {None, Cause.GPU_TOO_NEW, Cause.TORCHVISION, Cause.OPERATOR}
    assert diagnosis.exit_code == 20


def test_a_check_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(facts: Facts) -> list[Row]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("ddetr.doctor.diagnosis.check_limits", fail)
    row = only_fault(gpu_facts())
    assert (row.section, row.cause) == ("Limits", Cause.CHECK_FAILED)
    assert "ZeroDivisionError: division by zero" in row.text


def test_exit_codes_are_distinct_and_ordered() -> None:
    codes = [cause.code for cause in Cause]
    assert codes == sorted(set(codes))
    assert min(codes) >= 10
    assert len({cause.title for cause in Cause}) == len(codes)
    assert all(str(cause.code) in table() and cause.meaning in table() for cause in Cause)


@pytest.mark.parametrize("fault", [without_gpu, gpu_facts])
def test_facts_are_plain(fault: Callable[[], Facts]) -> None:
    import json

    found = diagnosed(fault()).to_dict()
    assert json.loads(json.dumps(found)) == found
