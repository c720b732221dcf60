"""From the facts to a row: why no GPU can be used, by the most fundamental reason."""

from ddetr.doctor.causes import Cause
from ddetr.doctor.cures import start_with_gpus, toolkit
from ddetr.doctor.facts import Driver, Facts
from ddetr.doctor.rows import Row, broken

SECTION = "GPU and driver"
_INSTALL_DRIVER = "Ubuntu: sudo ubuntu-drivers install; Debian: sudo apt install nvidia-driver; then reboot"
_WINDOWS_DRIVER = (
    "if Windows has an NVIDIA GPU: install NVIDIA's newest driver in Windows, then wsl --update and wsl --shutdown "
    "there, and start anew. Install no Linux driver inside WSL: it hides the one that Windows passes in"
)
_NVML_NOT_LOADED, _NVML_MISMATCH, _NVML_UNKNOWN = 9, 18, 999
_CUDA_STUB, _CUDA_NO_DEVICE, _CUDA_MISMATCH = 34, 100, 803
# CUresult of cuInit: what it means, what helps.
_CU_INIT = {
    _CUDA_STUB: (
        "libcuda.so.1 is the stub that the CUDA toolkit has for building, not the driver's library",
        "take .../lib64/stubs out of LD_LIBRARY_PATH",
    ),
    46: ("the GPU is in use by a process that has it for itself", "nvidia-smi -c DEFAULT ends the exclusive mode"),
    802: (
        "the GPUs of this machine are joined by NVSwitch, and the service that sets it up does not run",
        "on the host: sudo systemctl enable --now nvidia-fabricmanager (its version must be the driver's)",
    ),
    804: (
        "CUDA's forward-compatibility libraries are in use, which work on data-centre GPUs only",
        "take the compat folder out of LD_LIBRARY_PATH (sudo apt remove 'cuda-compat-*'), or update the driver",
    ),
    999: (
        "the driver answers with 'unknown error', as after a suspend or without its module nvidia_uvm",
        "on the host: sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm; if that does not help, reboot",
    ),
}


def usable(facts: Facts) -> bool:
    """CUDA starts, whatever else there is to say of the driver."""
    return facts.driver.cu_init == 0 or facts.pytorch.available


def why_unusable(facts: Facts) -> Row | None:
    """None where a GPU can be used."""
    driver, hardware, machine = facts.driver, facts.hardware, facts.machine
    if driver.nvml == _NVML_MISMATCH or driver.cu_init == _CUDA_MISMATCH:
        module = f" (the kernel runs {hardware.kernel_module})" if hardware.kernel_module else ""
        return broken(
            SECTION,
            "driver",
            "Driver/library version mismatch: the driver was updated, and the old one still runs in the "
            f"kernel{module}",
            "in Windows: wsl --shutdown, then start anew; if it stays, " + _WINDOWS_DRIVER
            if machine.wsl
            else "reboot the host"
            + ("; then start this container anew" if machine.container else "")
            + ". Without a reboot, when no program uses the GPU: sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset "
            "nvidia && sudo modprobe nvidia",
            Cause.DRIVER_MISMATCH,
        )
    if usable(facts):
        return None
    if driver.problem:
        return broken(
            SECTION,
            "driver",
            f"the driver's libraries do not answer as they should: {driver.problem}",
            _WINDOWS_DRIVER
            if machine.wsl
            else "try nvidia-smi; where that fails as well, reboot the host and install the driver anew",
            Cause.CUDA_FAILS,
        )
    if driver.cu_init == _CUDA_NO_DEVICE and "CUDA_VISIBLE_DEVICES" in facts.variables:
        return broken(
            SECTION,
            "GPU",
            f"CUDA_VISIBLE_DEVICES={facts.variables['CUDA_VISIBLE_DEVICES']!r} hides every GPU",
            "unset CUDA_VISIBLE_DEVICES, or set it to numbers from nvidia-smi -L, such as CUDA_VISIBLE_DEVICES=0",
            Cause.GPUS_HIDDEN,
        )
    if machine.wsl:
        return _on_wsl(facts)
    if machine.container and not hardware.devices and hardware.seen:
        return _container_without_gpus(facts)
    if not (hardware.seen or hardware.driver_folder or driver.libcuda or driver.gpus):
        return _no_gpu(facts)
    if not driver.libcuda:
        return _no_libcuda(facts)
    lost = machine.container and driver.nvml == _NVML_UNKNOWN and hardware.kernel_module
    if driver.nvml == _NVML_NOT_LOADED or driver.cu_init == _CUDA_NO_DEVICE or lost:
        return _not_loaded(facts)
    text = f"the driver does not start: {_answers(driver)}"
    to_do = "try nvidia-smi; look at the kernel's messages: sudo dmesg | grep -i nvrm; reboot"
    text, to_do = _CU_INIT.get(driver.cu_init or 0, (text, to_do))
    return broken(SECTION, "driver", text, to_do, Cause.CUDA_FAILS)


def _answers(driver: Driver) -> str:
    return f"cuInit returns {driver.cu_init}, NVML says {driver.nvml_error or 'nothing'}"


def _on_wsl(facts: Facts) -> Row:
    """There the driver is that of Windows; /dev/dxg says nothing, since graphics cards of every maker have it."""
    driver = facts.driver
    start = f"start the container with it: {start_with_gpus(facts)}; else " if facts.machine.container else ""
    if driver.cu_init == _CUDA_STUB:
        return broken(SECTION, "driver", *_CU_INIT[_CUDA_STUB], Cause.CUDA_FAILS)
    if not driver.libcuda or driver.cu_init == _CUDA_NO_DEVICE:
        without = "no libcuda.so.1" if not driver.libcuda else "libcuda.so.1 finds none"
        return broken(
            SECTION,
            "GPU",
            f"no NVIDIA GPU reaches WSL: {without}",
            f"{start}{_WINDOWS_DRIVER}. Without one everything runs on the CPU, slowly, and ddetr doctor --cpu checks "
            "just that",
            Cause.NO_GPU,
        )
    text = f"the driver of Windows does not start in WSL: {_answers(driver)}"
    return broken(
        SECTION, "driver", text, "in Windows: wsl --shutdown, then start anew; " + _WINDOWS_DRIVER, Cause.CUDA_FAILS
    )


def _container_without_gpus(facts: Facts) -> Row:
    hardware = facts.hardware
    what = f"{hardware.gpus_on_pci} NVIDIA GPU(s)" if hardware.gpus_on_pci else "NVIDIA's driver"
    void = facts.variables.get("NVIDIA_VISIBLE_DEVICES")
    to_do = f"start it with them: {start_with_gpus(facts)}"
    if void in ("void", "none", ""):
        to_do = f"NVIDIA_VISIBLE_DEVICES={void} leaves the GPUs out: take it away; " + to_do
    return broken(
        SECTION,
        "GPU",
        f"this machine has {what}, but the container was started without: there is no /dev/nvidia0 in here",
        f"{to_do}; {toolkit(facts)}",
        Cause.CONTAINER_WITHOUT_GPUS,
    )


def _no_gpu(facts: Facts) -> Row:
    looked = "on the PCI bus, no driver, no /dev/nvidia*"
    if facts.hardware.gpus_on_pci is None:
        looked = "to be seen (no PCI bus here), no driver, no /dev/nvidia*"
    to_do = "nothing, if none is expected: everything runs on the CPU, slowly, and ddetr doctor --cpu checks just that"
    if facts.machine.container:
        to_do += f". If the host has one, start with it: {start_with_gpus(facts)}"
    return broken(SECTION, "GPU", f"no NVIDIA GPU {looked}", to_do, Cause.NO_GPU)


def _no_libcuda(facts: Facts) -> Row:
    if folder := facts.hardware.driver_folder:
        return broken(
            SECTION,
            "driver",
            f"the driver's libraries are in {folder}, where they are not looked for (no libcuda.so.1)",
            f"export LD_LIBRARY_PATH={folder} (Kubernetes: under env of the container)",
            Cause.NO_DRIVER,
        )
    if facts.machine.container:
        asked = facts.variables.get("NVIDIA_DRIVER_CAPABILITIES")
        wrong = asked is not None and not {"compute", "all"} & set(asked.split(","))
        return broken(
            SECTION,
            "driver",
            "the GPU's devices are in this container, but the driver's libraries are not (no libcuda.so.1)",
            f"NVIDIA_DRIVER_CAPABILITIES={asked} lacks compute: set it to compute,utility"
            if wrong
            else (
                f"pass the GPUs in with their driver: {start_with_gpus(facts)}, not as bare devices "
                f"(/dev/nvidia0); {toolkit(facts)}"
            ),
            Cause.NO_DRIVER,
        )
    held = [name for name in facts.hardware.pci_drivers if name != "nvidia"]
    count = facts.hardware.gpus_on_pci
    what = f"{count} NVIDIA GPU(s) on the PCI bus" if count else "an NVIDIA GPU"
    return broken(
        SECTION,
        "driver",
        f"{what}, but NVIDIA's driver is not installed (no libcuda.so.1)"
        + (f"; the kernel driver {held[0]} holds the GPU" if held else ""),
        _INSTALL_DRIVER,
        Cause.NO_DRIVER,
    )


def _not_loaded(facts: Facts) -> Row:
    if facts.machine.container and not facts.hardware.devices:
        return _container_without_gpus(facts)
    if not facts.hardware.seen:
        return broken(
            SECTION,
            "GPU",
            "NVIDIA's libraries are installed, but there is no NVIDIA GPU on this machine",
            "choose a machine with a GPU, or check for work on the CPU: ddetr doctor --cpu",
            Cause.NO_GPU,
        )
    if facts.hardware.kernel_module:
        return _not_opened(facts)
    return broken(
        SECTION,
        "driver",
        "NVIDIA's libraries are installed, but its kernel module is not at work: it was not built for this kernel, or "
        "Secure Boot refuses it",
        "sudo modprobe nvidia says why; for a new kernel: sudo dkms autoinstall; for Secure Boot: enrol the key "
        "(mokutil)",
        Cause.NO_DRIVER,
    )


def _not_opened(facts: Facts) -> Row:
    """The kernel module is at work, and CUDA finds no GPU all the same."""
    who = "container" if facts.machine.container else "user"
    text = (
        f"the driver runs ({facts.hardware.kernel_module}), but this {who} may not open /dev/nvidia*: "
        f"{_answers(facts.driver)}"
    )
    to_do = (
        "look at the permissions: ls -l /dev/nvidia* (groups video and render); with MIG, at its instances: "
        "nvidia-smi -L"
    )
    if facts.machine.container:  # whose right to the devices systemd takes away with every daemon-reload
        to_do = (
            f"start the container anew (systemctl daemon-reload on the host takes its GPUs away); if it stays, {to_do}"
        )
    elif not facts.hardware.devices:
        text = (
            f"the driver runs ({facts.hardware.kernel_module}), but there is no /dev/nvidia0: {_answers(facts.driver)}"
        )
        to_do = "sudo nvidia-smi makes the devices, and says what is wrong where it cannot; then reboot"
    return broken(SECTION, "driver", text, to_do, Cause.CUDA_FAILS)
