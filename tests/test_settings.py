"""Options as fields: their ranges, what a run folder keeps of them, what may change when a run is resumed."""

import dataclasses
import math

import pytest

from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.errors import InputError
from ddetr.settings import check_ranges, flat, kept, names_with, option


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = option(3, at_least=1, at_most=5)
    workers: int | None = option(None, at_least=0, resume="free")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = option(0.5, at_least=0)
    names: tuple[str, ...] = ("a",)
    output: str | None = option(None, resume="session")

    def __post_init__(self) -> None:
        check_ranges(self)


def test_ranges() -> None:
    check_ranges(Inner(5, None))
    with pytest.raises(InputError, match="size must lie in 1 to 5, got 6"):
        check_ranges(Inner(6))
    with pytest.raises(InputError, match="workers must be at least 0, got -1"):
        check_ranges(Inner(workers=-1))
    with pytest.raises(InputError, match="rate must be at least 0, got nan"):
        Outer(rate=math.nan)


def test_a_text_in_the_place_of_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="lr_backbone must be a number, got 'low'"):
        OptimConfig(lr_backbone="low")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size must be a number or auto, got 'all'"):
        TrainConfig(DataConfig("x"), batch_size="all")  # type: ignore[arg-type]
    assert TrainConfig(DataConfig("x"), batch_size="auto").batch_size == "auto"


def test_a_run_keeps_what_is_its_own_in_plain_values() -> None:
    assert kept(Outer(output="x")) == {"inner": {"size": 3, "workers": None}, "rate": 0.5, "names": ["a"]}
    assert flat(kept(Outer()))["inner.size"] == 3
    assert names_with(Outer(), "free") == {"inner.workers"}


def test_every_option_of_a_run_says_what_becomes_of_it() -> None:
    """The sets that a resumed run is held against; an option that is added is decided about here."""
    config = TrainConfig(DataConfig("x"), {"num_queries": 7}, optim=OptimConfig(freeze=["backbone.*"]))
    assert names_with(config, "free") == {
        *(
            "data.num_workers",
            "data.on_bad_image",
            "activation_checkpointing",
            "max_bad_steps",
            "patience",
            "min_delta",
        ),
        "loggers",
    }
    assert names_with(config, "grows") == {"epochs"}
    augmentation = {"mosaic", "mixup", "scale_jitter", "scale_jitter_low", "scale_jitter_high", "color_jitter", "blur"}
    augmentation |= {"augmentation", "augmentation_off_epochs"}
    assert {f"data.{name}" for name in augmentation} <= names_with(config, "same")
    session = {field.name for field in dataclasses.fields(config)} - kept(config).keys()
    assert session == {
        *("output", "resume", "device", "devices", "checkpoint_every", "log_every", "num_pictures", "preflight"),
        *("accept_changed_data", "verbose"),
    }
    assert kept(config)["model"]["num_queries"] == 7
    assert kept(config)["model"]["two_stage"] is True, "defaults are kept too"
    assert kept(config)["optim"]["freeze"] == ["backbone.*"]


def test_compiling_pads_to_a_few_shapes() -> None:
    assert TrainConfig(DataConfig("x"), compile=True).data.padded_shapes == 3
    assert TrainConfig(DataConfig("x", padded_shapes=5), compile=True).data.padded_shapes == 5
    assert TrainConfig(DataConfig("x")).data.padded_shapes is None
