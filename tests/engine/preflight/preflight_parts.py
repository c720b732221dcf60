"""What the tests of the preflight share."""

from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.preflight.data import Check
from ddetr.engine.preflight.run import run_preflight

CHECKS = ["training images", "evaluation", "first loss", "learning", "gradients"]

SetUp = tuple[DetectionModule, DetectionData]


def looked_at(setup: SetUp, **options: object) -> dict[str, Check]:
    report = run_preflight(*setup, **{"from_nothing": True} | options)
    return {check.name: check for check in report.checks}


def statuses(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items() if check.status != "ok"}
