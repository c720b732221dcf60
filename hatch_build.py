"""Build hook: compiles the CPU kernel into the wheel (`py3-none-<platform>`), or says why it did not and goes on.

Without the library the package works (ddetr.ops falls back to stock PyTorch), so no failure here stops an installation.
DDETR_WHEEL_PLATFORM=<linux-x86_64|linux-aarch64|macos-arm64|macos-x86_64|windows-x86_64> makes another platform's wheel,
DDETR_NATIVE=0 makes a pure one.
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
        wanted = os.environ.get("DDETR_WHEEL_PLATFORM", "")
        if not wanted and (build.compilers(build.host()) or build.host() not in build.TARGETS):
            return []
        return ["ziglang>=0.14"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not _enabled():
            return
        build = _load_build()
        name = os.environ.get("DDETR_WHEEL_PLATFORM") or build.host()
        try:
            built = build.build(name)
        except build.BuildError as error:
            self.app.display_warning(f"ddetr: the CPU kernel was not built, slower PyTorch code stands in. {error}")
            return
        except Exception as error:  # an installation must not end here, whatever happened
            self.app.display_warning(f"ddetr: the CPU kernel was not built: {type(error).__name__}: {error}")
            return
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"/{built.path.relative_to(self.root).as_posix()}")
        platform = build.TARGETS[name].wheel if built.portable else _host_tag()
        build_data["tag"] = f"py3-none-{platform}"
        self.app.display_info(f"ddetr: CPU kernel built: {built.path.name}")


def _enabled() -> bool:
    return os.environ.get("DDETR_NATIVE", "1") != "0"


def _host_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
