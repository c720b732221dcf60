"""What is to be done, where that depends on the place: nothing can be installed into a container, whose image is built
anew."""

from typing import Any

from ddetr.doctor.facts import Driver, Facts
from ddetr.doctor.versions import architecture, least_driver, number, published, runs_on, toolkit_drivers

_START = {
    "docker": "docker run --gpus all ... (compose: the GPU reservation in compose.yaml)",
    "podman": "podman run --device nvidia.com/gpu=all ...",
    "kubernetes": "put nvidia.com/gpu: 1 into resources.limits of the container",
}
_TOOLKIT = (
    "if that is refused, install the NVIDIA Container Toolkit on the host: sudo apt install "
    "nvidia-container-toolkit && "
)
_TOOLKITS = {
    "docker": _TOOLKIT + "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker",
    "podman": _TOOLKIT
    + "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml (again after every update of the driver)",
    "kubernetes": "if no node takes the pod, install NVIDIA's device plugin (or its GPU operator) in the cluster",
}


def start_with_gpus(facts: Facts) -> str:
    """How this kind of container is started with GPUs."""
    return _START.get(facts.machine.container, _START["docker"])


def toolkit(facts: Facts) -> str:
    """What the host needs for that."""
    return _TOOLKITS.get(facts.machine.container, _TOOLKITS["docker"])


def another_pytorch(facts: Facts, capability: str | None, *, which: str) -> str | None:
    """How to come to a PyTorch for a GPU and this driver; None where none is known.

    The image's own variants first, since ddetr is tested with their PyTorch; then the newest PyTorch.

    Args:
        facts: all that is known.
        capability: of the GPU, "8.6"; None where it is not known.
        which: words after "install a PyTorch".
    """
    container, driver = facts.machine.container, facts.driver
    if found := _variant(capability, driver):
        name, variant = found
        index = "" if variant["locked"] else " TORCH_INDEX=<PyTorch's own index of it>"
        image = f"make image VARIANT={name}{index}"
        if container:
            return f"build the image with another variant: {image}"
        return (
            f"install a PyTorch {which}: uv pip install --reinstall --torch-backend={name} {_pins(variant)} "
            f"(the image: {image})"
        )
    first = published()["first_toolkits"]["toolkits"].get(architecture(capability)) if capability else None
    if first is None or number(first) < (12, 8):
        return None
    later = _variant(capability) if container else None
    if later and later[1]["cuda"] != facts.pytorch.cuda:
        name, variant = later
        update = newer_driver(facts, least_driver(variant["cuda"]), variant["cuda"])
        return f"{update}, and build the image with another variant: make image VARIANT={name}"
    needed = toolkit_drivers(first)
    too_old = needed and driver.version and number(driver.version) < number(needed[0])
    and_driver = f" (and driver {needed[0]} or newer)" if too_old and needed else ""
    if container:
        return (
            "outside the container (no image of ddetr has one for this GPU and driver): pip install . into an "
            f"environment with PyTorch 2.7 or later for CUDA {first}{and_driver}"
        )
    backend = f"cu{first.replace('.', '')}"
    return (
        f"install a PyTorch {which}: uv pip install --upgrade --torch-backend={backend} torch torchvision{and_driver}"
    )


def newer_driver(facts: Facts, wanted: str | None, cuda: str) -> str:
    if facts.machine.wsl:  # whose numbers are others
        return f"update NVIDIA's driver in Windows to one for CUDA {cuda} or newer"
    return f"update the driver on the host to {wanted or 'that of CUDA ' + cuda} or newer"


def newer_pytorch(facts: Facts) -> str:
    if facts.machine.container:
        return "outside the container: pip install . into an environment with a newer PyTorch"
    return "install a newer PyTorch: pip install --upgrade torch torchvision"


def first_pytorch(facts: Facts) -> str:
    """Where there is none: that of the default image, or of the other one where the GPU needs that."""
    capability = facts.gpus[0].capability if facts.gpus else None
    name = default = published()["image"]["default_variant"]
    if (found := _variant(capability, facts.driver)) and found[1]["locked"]:  # such is PyPI's build
        name = found[0]
    image = "make image" if name == default else f"make image VARIANT={name}"
    pins = _pins(published()["variants"][name])
    return installing(facts, f"uv pip install {pins} (in the image ddetr is ready to run: {image})", image)


def installing(facts: Facts, command: str, image: str = "make image") -> str:
    """A command that repairs the environment; in a container, the image that has what it installs."""
    if facts.machine.container:
        return f"leave this container as it is, and build the image anew, in which everything matches: {image}"
    return command


def _pins(variant: dict[str, Any]) -> str:
    return f"torch=={variant['torch']} torchvision=={variant['torchvision']}"


def _variant(capability: str | None, driver: Driver | None = None) -> tuple[str, dict[str, Any]] | None:
    """Name and description of the image's variant that has kernels for the GPU and runs on the driver; None for the
    driver: on any.

    The default one where it serves, then those that are locked, then the newest.
    """
    default = published()["image"]["default_variant"]
    variants = published()["variants"].items()
    for name, variant in sorted(variants, key=lambda row: (row[0] == default, row[1]["locked"], row[0]), reverse=True):
        kernels = capability is None or runs_on(variant["architectures"], capability)
        if kernels and (driver is None or _runs(driver, variant["cuda"])):
            return name, variant
    return None


def _runs(driver: Driver, cuda: str) -> bool:
    """Also where that is not known."""
    least = least_driver(cuda)
    if driver.version and least:
        return number(driver.version) >= number(least)
    return driver.cuda is None or number(driver.cuda)[0] >= number(cuda)[0]
