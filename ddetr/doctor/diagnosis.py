"""The whole examination: gather the facts, check them, sum up. A check that raises is a row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ddetr.doctor import driver, machine, pytorch, trial
from ddetr.doctor.causes import Cause
from ddetr.doctor.check_driver import SECTION as DRIVER
from ddetr.doctor.check_driver import check_driver, served
from ddetr.doctor.check_machine import check_folders, check_limits, check_system
from ddetr.doctor.check_pytorch import check_answer, check_pytorch
from ddetr.doctor.check_trial import SECTION as TRIED
from ddetr.doctor.check_trial import check_trial
from ddetr.doctor.children import sentence
from ddetr.doctor.facts import Facts
from ddetr.doctor.rows import Row, broken

_T = TypeVar("_T")
# Found broken in these, a GPU is not to be tried: the trial would only repeat it.
_NOT_TO_BE_TRIED = {Cause.DRIVER_TOO_OLD, Cause.GPU_TOO_NEW, Cause.GPU_TOO_OLD}


@dataclass(frozen=True)
class Diagnosis:
    facts: Facts
    rows: list[Row]

    @property
    def cause(self) -> Cause | None:
        """The most fundamental one; None where nothing is broken."""
        causes = [row.cause for row in self.rows if row.cause is not None]
        return min(causes, key=lambda cause: cause.code, default=None)

    @property
    def exit_code(self) -> int:
        return self.cause.code if self.cause else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "exit_name": self.cause.title if self.cause else "ok",
            "rows": [row.to_dict() for row in self.rows],
            "facts": self.facts.to_dict(),
        }


def examine(
    *, data: str | None = None, output: str | None = None, cpu: bool = False, compute: bool = True, timeout: float = 300
) -> Diagnosis:
    """Look at this machine.

    Args:
        data: folder of images to look at; by default that of the image, where it is.
        output: folder for runs; by default that of the image, else the current folder.
        cpu: no GPU is expected, and none is looked at.
        compute: really run computations on the devices.
        timeout: seconds for the computations of a device.
    """
    facts, rows = Facts(cpu=cpu), []

    def gather(name: str, look: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return look()
        except Exception as error:  # whatever it is: the other checks go on
            rows.append(_failed("Doctor", name, error))
            return otherwise

    facts.machine = gather("machine", machine.look, facts.machine)
    facts.variables = machine.variables()
    facts.limits = gather("limits", machine.look_at_limits, facts.limits)
    facts.data = gather("data", lambda: _data_folder(data), None)
    facts.output = gather("output", lambda: _output_folder(output), None)
    facts.pytorch = gather("PyTorch", pytorch.look, facts.pytorch)
    if not cpu:
        facts.hardware = gather("hardware", machine.look_at_hardware, facts.hardware)
        facts.driver = gather("driver", driver.look, facts.driver)
    if compute and facts.pytorch.state == "works":
        causes = {row.cause for row in check(facts)}
        gpus = [] if cpu or not facts.pytorch.available or causes & _NOT_TO_BE_TRIED else served(facts)
        facts.steps = gather("trial", lambda: trial.try_devices(gpus, timeout=timeout), None)
    return Diagnosis(facts, check(facts) + rows)


def check(facts: Facts) -> list[Row]:
    """All rows, from facts alone, in the order of the table."""
    about_driver = _guarded(DRIVER, lambda: check_driver(facts))
    well = not any(row.state == "broken" for row in about_driver) and not facts.cpu
    about_torch = _guarded("PyTorch", lambda: check_pytorch(facts, driver_is_well=well))
    return [
        *_guarded("PyTorch's own answer", lambda: check_answer(facts)),
        *_guarded("Machine", lambda: check_system(facts)),
        *about_driver,
        *about_torch,
        *_guarded("Limits", lambda: check_limits(facts)),
        *_guarded("Folders", lambda: check_folders(facts)),
        *_guarded(TRIED, lambda: check_trial(facts)),
    ]


def _guarded(section: str, make: Callable[[], list[Row]]) -> list[Row]:
    try:
        return make()
    except Exception as error:
        return [_failed(section, "check", error)]


def _failed(section: str, name: str, error: Exception) -> Row:
    to_do = "this is a fault of ddetr: please report it with the output of ddetr doctor --json"
    return broken(section, name, f"the check itself failed: {sentence(error)}", to_do, Cause.CHECK_FAILED)


def _data_folder(path: str | None) -> Any:
    if path is not None:
        return machine.look_at_folder(path, asked_for=True, to_write=False)
    if Path(machine.DATA).parent.is_dir():
        return machine.look_at_folder(machine.DATA, asked_for=False, to_write=False)
    return None


def _output_folder(path: str | None) -> Any:
    default = machine.OUTPUT if Path(machine.OUTPUT).is_dir() else str(Path.cwd())
    return machine.look_at_folder(path or default, asked_for=path is not None, to_write=True)
