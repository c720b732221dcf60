"""TensorBoard, Weights & Biases and MLflow beside the tables of the run folder, all through Lightning's loggers.

Only the first process speaks to them. None of them may cost the run: one that fails is reported once and switched off.
A resumed run continues what it has begun there, without repeated steps.

What the services themselves read from the environment is honoured: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, ...
"""

import importlib.util
import json
import logging
import math
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from ddetr.engine.run.folder import RunFolder
from ddetr.errors import InputError
from ddetr.settings import flat
from ddetr.untrusted import MAX_RUN_BYTES, parse_json, read_text

logger = logging.getLogger(__name__)

LoggerName = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "ddetr"  # W&B's project and MLflow's experiment, where the environment names none
SECONDS_TO_CLOSE = 1.5  # that a run which is stopped gives all of them together
_IDS = "loggers.json"  # in the run folder: under which id a service knows the run
_INSTALL = {name: f"pip install 'ddetr[{name}]'" for name in ("wandb", "mlflow")}


def chosen_loggers(names: Sequence[LoggerName] | None) -> list[LoggerName]:
    """The loggers by name, each once; None means TensorBoard where it is installed.

    Raises:
        InputError: a name that is none of ours, or a logger whose package is missing.
    """
    if names is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in names:
        if name not in _OPEN:
            raise InputError(f"loggers: expected any of {', '.join(_OPEN)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            cure = _INSTALL.get(name, f"pip install {name}")
            raise InputError(f"loggers: the package {name} is not installed: {cure}, or leave {name} out")
    return list(dict.fromkeys(names))


class Loggers(Callback):
    """The loggers of a run. Open between the start and the end of the training; `send` does nothing outside.

    Args:
        names: as `chosen_loggers` returns them; none on all processes but the first.
        run: the folder, for what is kept on disk and for the ids of the services.
        config: the settings of the run, which are logged with it.
    """

    def __init__(self, names: Sequence[LoggerName], run: RunFolder, config: Mapping[str, Any]):
        self.names, self.run, self.config = names, run, config
        self._open: dict[str, Logger] = {}
        self._hook = threading.excepthook
        # A killed run has logged more than its last checkpoint knows of, and a service takes nothing back. The steps
        # that are trained again give the same numbers: they are not sent again.
        self._sent = {kind: self._last_step(f"{kind}.csv") for kind in ("train", "val")}

    def _last_step(self, name: str) -> int:
        return max((int(row["step"]) for row in self.run.table(name).rows()), default=0)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if "tensorboard" in self.names:
            self._hook, threading.excepthook = threading.excepthook, self._silent_of_tensorboard
        for name in self.names:
            self._guarded(name, lambda name=name: self._start(name, trainer.global_step))

    def _start(self, name: str, step: int) -> None:
        ids = self._ids()
        is_new, opened = _OPEN[name](self.run, ids, step)
        self._open[name] = opened
        if is_new:
            if name == "tensorboard":
                _log_config_to_tensorboard(opened, self.config)
            else:
                opened.log_hyperparams(dict(self.config))
        if ids:
            self.run.write_json(_IDS, ids)

    def _ids(self) -> dict[str, str]:
        path = self.run.path / _IDS
        ids = parse_json(read_text(path, MAX_RUN_BYTES), path.name) if path.is_file() else {}
        return ids if isinstance(ids, dict) else {}

    def send(self, kind: Literal["train", "val"], step: int, values: Mapping[str, float | None]) -> None:
        """Send a row of train.csv or val.csv; numbers that are none, as the AP of a size that does not occur, are left
        out."""
        metrics = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
        for name, opened in list(self._open.items()):
            # What TensorBoard had of these steps was purged: it is all on disk, but the last seconds before a kill.
            if name == "tensorboard" or step > self._sent[kind]:
                self._guarded(name, lambda opened=opened: opened.log_metrics(metrics, step))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close("success")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close("failed" if isinstance(exception, Exception) else "KILLED")

    def _close(self, status: str) -> None:
        for name, opened in list(self._open.items()):
            close = partial(self._guarded, name, partial(_finish, name, opened, status))
            if status == "KILLED":  # somebody waits for the end
                thread = threading.Thread(target=close, daemon=True)
                thread.start()
                thread.join(SECONDS_TO_CLOSE / len(self.names))
            else:
                close()
        self._open.clear()
        if threading.excepthook == self._silent_of_tensorboard:
            threading.excepthook = self._hook

    def _silent_of_tensorboard(self, failed: Any) -> None:
        """What ends TensorBoard's writing thread is raised again where the next row is sent, and is said there."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._hook(failed)

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service, a network or a full disk comes up with
            self._open.pop(name, None)
            while error.__cause__ is not None:  # Lightning's own word is of a value that it could not log
                error = error.__cause__
            logger.warning(
                "%s failed and is switched off, the run goes on without it (%s: %s)",
                name, type(error).__name__, " ".join(str(error).split())[:300],
            )  # fmt: skip


def _tensorboard(run: RunFolder, ids: dict[str, str], step: int) -> tuple[bool, Logger]:
    from lightning.pytorch.loggers import TensorBoardLogger

    is_new = not (run.path / "tensorboard").exists()
    opened = TensorBoardLogger(
        run.path, name="", version="tensorboard", default_hp_metric=False, purge_step=step + 1, flush_secs=30
    )
    return is_new, opened


def _wandb(run: RunFolder, ids: dict[str, str], step: int) -> tuple[bool, Logger]:
    from lightning.pytorch.loggers import WandbLogger

    is_new = "wandb" not in ids
    run_id = ids.setdefault("wandb", secrets.token_hex(8))
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    opened = WandbLogger(name=run.path.resolve().name, save_dir=run.path, project=project, id=run_id)
    _ = opened.experiment  # whether it can be reached is known now
    return is_new, opened


def _mlflow(run: RunFolder, ids: dict[str, str], step: int) -> tuple[bool, Logger]:
    # Its own patience with a server that does not answer is several minutes per row.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from lightning.pytorch.loggers import MLFlowLogger

    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(
        logging.ERROR
    )  # "Experiment not found. Creating it."
    folder = run.path.resolve().parent  # one store for all runs beside each other, to compare them
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    is_new = "mlflow" not in ids
    opened = MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=run.path.resolve().name,
        tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}",
        artifact_location=None if uri else (folder / "mlartifacts").as_uri(),
        run_id=ids.get("mlflow"),
    )
    ids["mlflow"] = opened.run_id
    if not is_new:
        opened.experiment.update_run(opened.run_id, status="RUNNING")
    return is_new, opened


_OPEN: dict[str, Callable[[RunFolder, dict[str, str], int], tuple[bool, Logger]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _log_config_to_tensorboard(opened: Any, config: Mapping[str, Any]) -> None:
    """As text, and for the table of hyper-parameters, which shows val/AP beside them."""
    from torch.utils.tensorboard.summary import hparams

    text = yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)
    opened.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in flat(config).items()
    }
    for summary in hparams(plain, {"val/AP": 0.0}):  # the number is not written, it names the column
        opened.experiment._get_file_writer().add_summary(summary)


def _finish(name: str, opened: Any, status: str) -> None:
    opened.finalize(status)
    if name == "wandb":  # otherwise the next run of this process would go on in this one
        opened.experiment.finish(exit_code=int(status != "success"))
