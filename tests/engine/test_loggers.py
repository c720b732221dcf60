"""Who follows a run: TensorBoard for real, Weights & Biases and MLflow through small stand-ins for their packages."""

import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from ddetr.engine.callbacks import Watch
from ddetr.engine.config import TrainConfig
from ddetr.engine.loggers import chosen_loggers
from ddetr.engine.train import train
from ddetr.errors import InputError

STEPS, VALIDATIONS = [1, 2, 3, 4, 5, 6], [2, 4, 6]


@pytest.fixture
def settings(short_run: dict[str, Any], tiny_model: dict[str, Any]) -> dict[str, Any]:
    """Three epochs of two steps."""
    return short_run | {"model": tiny_model, "epochs": 3, "device_batch_size": 4}


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train, but stop after step 3, which is logged and which the last checkpoint does not know of."""

    def run(**settings: Any) -> None:
        original = Watch.on_train_batch_end

        def stops(self: Watch, trainer: Any, *arguments: Any) -> None:
            original(self, trainer, *arguments)
            if trainer.global_step == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Watch, "on_train_batch_end", stops)
            with pytest.raises(KeyboardInterrupt):
                train(TrainConfig(**settings))

    return run


class Service:
    """What a service has been told."""

    def __init__(self) -> None:
        self.opened: list[str] = []  # run ids
        self.config: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []  # with their "step"
        self.ends: list[Any] = []
        self.fails_at: int | None = None

    def take(self, row: dict[str, float]) -> None:
        if row["step"] == self.fails_at:
            raise ConnectionError("the network\nis down")
        self.rows.append(row)

    def steps(self, name: str) -> list[int]:
        return [row["step"] for row in self.rows if name in row]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()

    class Run:
        def __init__(self, run_id: str):
            self.id, self.name = run_id, "name"
            self.config = SimpleNamespace(update=lambda params, **_: service.config.append(params))

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, row: dict[str, float]) -> None:
            service.take({**row, "step": row["trainer/global_step"]})

        def finish(self, exit_code: int) -> None:
            service.ends.append(exit_code)
            package.run = None

    def init(**arguments: Any) -> Run:
        assert package.run is None, "the run before was not finished"
        assert (arguments["resume"], arguments["project"]) == ("allow", "ddetr")
        service.opened.append(arguments["id"])
        package.run = Run(arguments["id"])
        return package.run

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    package = install(monkeypatch, "wandb", run=None, init=init)
    install(monkeypatch, "wandb.sdk")
    install(monkeypatch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    install(monkeypatch, "wandb.wandb_run", Run=Run)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return service


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()

    class MlflowClient:
        def __init__(self, uri: str):
            assert uri.startswith("sqlite:///")
            assert uri.endswith("/mlflow.db")

        def get_experiment_by_name(self, name: str) -> None: ...

        def create_experiment(self, name: str, artifact_location: str) -> str:
            assert name == "ddetr"
            return "experiment"

        def create_run(self, experiment_id: str, tags: Any) -> SimpleNamespace:
            service.opened.append("new")
            return self.get_run("run")

        def get_run(self, run_id: str) -> SimpleNamespace:
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id, experiment_id="experiment"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert run_id == "run"
            if params:
                service.config.append({param.key: param.value for param in params})
            if metrics:
                service.take({metric.key: metric.value for metric in metrics} | {"step": metrics[0].step})

        def set_terminated(self, run_id: str, status: str) -> None:
            service.ends.append(status)

        def update_run(self, run_id: str, status: str) -> None:
            service.ends.append(status)

    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(variable, "1")  # so that what is set for the service does not outlive the test
    install(monkeypatch, "mlflow", set_tracking_uri=lambda uri: None)
    install(monkeypatch, "mlflow.tracking", MlflowClient=MlflowClient)
    install(monkeypatch, "mlflow.tracking.context")
    install(monkeypatch, "mlflow.tracking.context.registry", resolve_tags=lambda tags: tags)
    install(monkeypatch, "mlflow.utils")
    install(monkeypatch, "mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="name")
    entities = {"Metric": SimpleNamespace, "Param": SimpleNamespace}
    install(monkeypatch, "mlflow.entities", **entities)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    return service


def test_a_resumed_run_goes_on_in_the_same_place_without_doubled_steps(
    settings: dict[str, Any], interrupted: Callable[..., None], wandb: Service, mlflow: Service, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    names = ["tensorboard", "wandb", "mlflow"]
    interrupted(**settings, loggers=names, output=str(run))
    train(TrainConfig(**settings, loggers=names, output=str(run), resume="last"))

    for service in (wandb, mlflow):
        assert service.steps("train/loss") == service.steps("train/data_wait") == STEPS
        assert service.steps("val/AP") == VALIDATIONS
        assert len(service.config) == 1, "settings are logged with a new run alone"
    assert wandb.config[0]["optim"]["lr"] == 1e-3
    assert mlflow.config[0]["optim/lr"] == "0.001"
    assert wandb.opened[0] == wandb.opened[1]
    assert mlflow.opened == ["new"]
    assert wandb.ends == [1, 0]
    assert mlflow.ends == ["KILLED", "RUNNING", "FINISHED"]

    events = read_tensorboard(run)
    for name, expected in (("train/loss", STEPS), ("train/lr_rest", STEPS), ("val/AP", VALIDATIONS)):
        assert [event.step for event in events.Scalars(name)] == expected
    assert "config/text_summary" in events.Tags()["tensors"]


def read_tensorboard(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_is_the_default_and_can_be_switched_off(settings: dict[str, Any], tmp_path: Path) -> None:
    assert chosen_loggers(None) == ["tensorboard"]
    run = train(TrainConfig(**settings | {"epochs": 1}, loggers=[], output=str(tmp_path / "run"))).path
    assert not (run / "tensorboard").exists()
    assert (run / "train.csv").is_file()


@pytest.mark.parametrize("step", [1, 3])
def test_a_logger_that_fails_costs_nothing_but_itself(
    settings: dict[str, Any],
    wandb: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: int,
) -> None:
    """The network of one goes down, the disk of the other is full: each is reported once, the run is whole."""
    wandb.fails_at = step
    original = TensorBoardLogger.log_metrics

    def full(self: TensorBoardLogger, metrics: dict[str, float], step: int) -> None:
        if step == 4:
            raise OSError(28, "No space left on device")
        original(self, metrics, step)

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", full)
    with caplog.at_level("WARNING", "ddetr"):
        result = train(TrainConfig(**settings, loggers=["tensorboard", "wandb"], output=str(tmp_path / "run")))
    said = [record.getMessage() for record in caplog.records if "switched off" in record.getMessage()]
    assert len(said) == 2
    assert said[0].startswith("wandb failed and is switched off")
    assert said[0].endswith("(ConnectionError: the network is down)")
    assert "No space left on device" in said[1]
    assert wandb.steps("train/loss") == STEPS[: step - 1]
    assert len((result.path / "train.csv").read_text().splitlines()) == 1 + len(STEPS)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(InputError, match=rf"the package {name} is not installed: pip install 'ddetr\[{name}\]'"):
        train(TrainConfig(**settings, loggers=[name], output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(InputError, match="expected any of tensorboard, wandb, mlflow, got 'comet'"):
        chosen_loggers(["comet"])
