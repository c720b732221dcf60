"""Build hook: compiles the CPU kernel into the wheel (`py3-none-<platform>`), or says why it did not and goes on.

Without the library the package works (ddetr.ops falls back to stock PyTorch), so no failure here stops an installation.
DDETR_NATIVE=0 makes a pure wheel. DDETR_WHEEL_PLATFORM (`make wheel` sets it) makes one to give away, which every
machine of a platform can use: linux-x86_64, linux-aarch64, macos-arm64, macos-x86_64, windows-x86_64, or `host` for
this machine's. ziglang compiles it, and without a library there is no such wheel: failures end the build.
"""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _load_build() -> ModuleType:
    """ddetr/ops/native/build.py by its path: ddetr itself can't be imported here, PyTorch is missing."""
    path = Path(__file__).resolve().parent / "ddetr" / "ops" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("ddetr_native_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NativeBuildHook(BuildHookInterface):
    """Runs for wheels and editable installations."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """ziglang (one wheel of about 100 MB) only where the result must be portable or there is no compiler."""
        if self.target_name != "wheel" or not _enabled():
            return []
        build = _load_build()
        if not _platform() and (build.compilers(build.host()) or build.host() not in build.TARGETS):
            return []
        return ["ziglang>=0.14"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not _enabled():
            return
        build = _load_build()
        name = build.host() if _platform() in ("", "host") else _platform()
        if _platform() and name not in build.TARGETS:
            self.app.abort(f"DDETR_WHEEL_PLATFORM={_platform()}: choose one of {', '.join(['host', *build.TARGETS])}")
        try:
            built = build.build(name, portable=bool(_platform()))
        except Exception as error:  # an installation must not end here, whatever happened
            why = str(error) if isinstance(error, build.BuildError) else f"{type(error).__name__}: {error}"
            if _platform():
                self.app.abort(f"ddetr: no wheel for {name}. {why}")
            self.app.display_warning(f"ddetr: the CPU kernel was not built, slower PyTorch code stands in. {why}")
            return
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"/ddetr/ops/native/lib/{built.path.name}")
        platform = build.TARGETS[name].wheel if built.portable else _host_tag()
        build_data["tag"] = f"py3-none-{platform}"
        self.app.display_info(f"ddetr: CPU kernel built: {built.path.name}")


def _platform() -> str:
    return os.environ.get("DDETR_WHEEL_PLATFORM", "").strip()


def _enabled() -> bool:
    return os.environ.get("DDETR_NATIVE", "1") != "0"


def _host_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
