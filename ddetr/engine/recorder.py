"""The black-box recorder: what is done about a training step that fails, and what is kept of it.

A step whose loss or gradient is not finite is skipped: no update, and the batch norms' statistics are put back. A step
that raises ends the run. Both leave a bundle that `ddetr replay` computes again:

RUN/blackbox/step-000123/
    what.txt      what happened, in words
    bundle.json   the same for programs: step, images, losses, first place that is not finite, settings, versions
    state.pt      batch, weights and optimiser before the step, random states: plain types and tensors
"""

import importlib.metadata
import json
import logging
import math
import platform
import random
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ddetr import __version__
from ddetr.atomic import write_folder_atomically, write_text
from ddetr.checkpoint.published import portable_config
from ddetr.datasets import Annotations, sample_seed
from ddetr.engine.finite import MicroBatch, NormStatistics, NotFinite, find_non_finite, non_finite_parameters

if TYPE_CHECKING:
    from ddetr.engine.module import DetectionModule

logger = logging.getLogger(__name__)

FOLDER = "blackbox"
FORMAT = 1
MAX_BUNDLES = 3  # a run: its first two and its latest; one holds weights and optimiser, three times the model
MAX_IN_A_ROW = 3  # as many different batches in a row are not at fault: the weights are
LEAST_LOSS_SCALE = 1.0  # of a gradient scaler: above it overflow is its way of finding the scale, and no bad step


class StepGuard(Callback):
    """Skips the steps that are not finite, up to a bound, and records them and every crash.

    `skipped` says whether the last step left the weights as they were.
    """

    def __init__(
        self,
        run: Path | None = None,
        *,
        max_bad_steps: int = 10,
        config: Mapping[str, Any] | None = None,
        annotations: Annotations | None = None,
        last_checkpoint: Path | None = None,
    ):
        """
        Args:
            run: run folder for the bundles; None keeps none.
            max_bad_steps: steps of the whole run, resumed or not, that may be skipped; the next one stops it, and so
                does the third in a row.
            config: settings of the run, written into the bundles.
            annotations: of the training images, to name their files and classes.
            last_checkpoint: where the run's last checkpoint is once there is one, to name it.
        """
        self.run, self.max_bad_steps, self.config = run, max_bad_steps, dict(config or {})
        self.annotations, self.last_checkpoint = annotations, last_checkpoint
        self.total, self.in_a_row, self.skipped = 0, 0, False
        self._bad: _BadStep | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    @contextmanager
    def step(self, module: "DetectionModule", batch: Sequence[MicroBatch], num_boxes: float) -> Iterator[None]:
        """Around forward, backward and update of one step, in which `check` is called once the gradient is there.

        Raises:
            FloatingPointError: too many bad steps; on all processes alike.
        """
        now = _Step.of(module, batch, num_boxes)
        self._bad, self.skipped = None, False
        repaired_before = _repaired_costs(module)
        try:
            yield
        except Exception as error:
            now.norms.restore()
            self._record_crash(now, error)
            raise
        repaired = _repaired_costs(module) - repaired_before
        if self._bad is not None:
            now.norms.restore()
            self._settle(now, self._bad, repaired)
            return
        self.in_a_row = 0
        if repaired:
            logger.warning(
                "step %d: %d matching costs of images %s were not finite and counted as the worst, though the loss is finite",
                now.number, repaired, ", ".join(map(str, _image_ids(batch))),
            )  # fmt: skip

    def check(
        self, module: "DetectionModule", loss: Tensor, grad_norm: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        """After the backward pass, before the update: takes the gradient away where the step must be skipped.

        One all-reduce and one copy to the host, so that all processes decide alike.
        """
        is_bad_loss, is_bad_gradient = agree(torch.stack([~torch.isfinite(loss), ~torch.isfinite(grad_norm)]))
        if not (is_bad_loss or is_bad_gradient):
            return
        self.skipped = True
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        if scaler is not None and not is_bad_loss and scaler.get_scale() > LEAST_LOSS_SCALE:
            return  # the scaler skips the update itself, and halves its scale
        self._bad = _BadStep(float(loss), float(grad_norm), None if scaler is None else scaler.state_dict())
        optimizer.zero_grad()  # without gradients the update changes nothing, neither weights nor moments

    def on_validation_start(self, trainer: pl.Trainer, module: "DetectionModule") -> None:
        self._refuse_broken_weights(trainer, module)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: "DetectionModule", checkpoint: dict[str, Any]) -> None:
        self._refuse_broken_weights(trainer, module)

    def _refuse_broken_weights(self, trainer: pl.Trainer, module: "DetectionModule") -> None:
        """A finite gradient can still lead to weights that are not: they must not replace the last good ones."""
        if broken := non_finite_parameters(module.model):
            raise FloatingPointError(
                f"step {trainer.global_step} left weights that are not finite, {broken[0]} first: the run is stopped before "
                f"they are saved. {self._advice()}"
            )

    def _settle(self, now: "_Step", bad: "_BadStep", repaired: int) -> None:
        """Diagnose, record, report, and stop the run where it cannot go on. Every process comes here together."""
        self.total += 1
        self.in_a_row += 1
        module = now.module
        # Every process looks at its own share: the exchange has spread what one of them brought in.
        scale = bad.scaler["scale"] if bad.scaler else 1.0
        found, why_not = _diagnosed(now, scale)
        now.norms.restore()
        own = {
            "rank": module.global_rank,
            "loss": bad.loss,
            "image_ids": _image_ids(now.batch),
            "repaired": repaired,
            "found": None if found is None else asdict(found),
        }
        everyone = _gathered(own)
        guilty = next((one for one in everyone if not math.isfinite(one["loss"])), None)
        guilty = guilty or next((one for one in everyone if one["found"]), everyone[0])
        if guilty["found"]:
            first = guilty["found"]["message"]
        else:
            first = why_not or "computed again, the step is finite: the failure does not repeat"
        losses = f"loss {guilty['loss']} and gradient norm {bad.grad_norm}"
        if guilty["repaired"]:
            losses += f"; {guilty['repaired']} matching costs were not finite"
        place = f" on process {guilty['rank']}" if len(everyone) > 1 else ""
        said = f"step {now.number} has {losses}{place}, images {', '.join(map(str, guilty['image_ids']))}: {first}"
        broken = non_finite_parameters(module.model)
        bundle = None
        if module.global_rank == guilty["rank"]:
            bundle = self._record(now, said, found, loss=bad.loss, grad_norm=bad.grad_norm, scaler=bad.scaler)
        bundle = next((path for path in _gathered(bundle) if path), None)
        recorded = f". Recorded: ddetr replay {bundle}" if bundle else ""
        if broken:
            why = "the weights themselves are not finite, which no skipping mends"
        elif self.total > self.max_bad_steps:
            why = f"{self.total} bad steps are more than --max_bad_steps {self.max_bad_steps} allows"
        elif self.in_a_row >= MAX_IN_A_ROW:
            why = f"{self.in_a_row} bad steps in a row are more than bad luck with the images"
        else:
            if module.global_rank == 0:
                logger.warning("%s. Skipped, %d of at most %d%s", said, self.total, self.max_bad_steps, recorded)
            return
        raise FloatingPointError(f"{said}. The run is stopped: {why}. {self._advice()}{recorded}")

    def _advice(self) -> str:
        place = self.last_checkpoint
        if place is not None and place.is_file():
            intact = f"its last checkpoint is intact: {place}, from which the same command with --resume goes on"
        else:
            intact = "it has no checkpoint yet"
        return (
            f"A lower --optim.lr, --optim.warmup_steps or --precision 32 usually helps; `ddetr data audit` checks the boxes; "
            f"{intact}"
        )

    def _record_crash(self, now: "_Step", error: Exception) -> None:
        """Never raises: the error itself is what must reach the user."""
        if self.run is None:
            return
        try:
            place = module_of(error.__traceback__, now.module.model)
            said = f"step {now.number} failed{f' in {place}' if place else ''}: {type(error).__name__}: {error}"
            found = None
            # A GPU that is out of memory, or in an unknown state, is not asked to compute the step again.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "CUDA" not in str(error):
                found, _ = _diagnosed(now, 1.0)
                now.norms.restore()
            if found is not None:
                said += f". Before that, {found.message}"
            words = "".join(traceback.format_exception(error))
            bundle = self._record(
                now, said, found, error={"type": type(error).__name__, "module": place, "traceback": words}
            )
            if bundle:
                logger.error("%s. Recorded: ddetr replay %s", said, bundle)
        except Exception:
            logger.exception("the failed step could not be recorded")

    def _record(self, now: "_Step", said: str, found: NotFinite | None, **facts: Any) -> str | None:
        """The bundle's path, or None where none could be written, which a full disk must not turn into a crash."""
        if self.run is None:
            return None
        rank = now.module.global_rank
        path = self.run / FOLDER / f"step-{now.number:06d}{f'-rank{rank}' if rank else ''}"
        scaler = facts.pop("scaler", None)

        def write(folder: Path) -> None:
            write_text(folder / "bundle.json", json.dumps(_plain(header), indent=1, default=str) + "\n")
            write_text(folder / "what.txt", _in_words(header))
            torch.save(_state(now, scaler), folder / "state.pt")

        try:
            header = _header(now, self.config, self.annotations) | {
                "what": said,
                "not_finite": None if found is None else asdict(found),
                **facts,
            }
            _make_room(path.parent, path.name)
            write_folder_atomically(path, write)
        except Exception as error:  # a run that could go on must not end here, and leave other processes waiting
            logger.warning("the failed step could not be recorded in %s: %s: %s", path, type(error).__name__, error)
            return None
        return str(path)


@dataclass(frozen=True)
class _BadStep:
    loss: float
    grad_norm: float
    scaler: dict[str, Any] | None  # before it has reacted


@dataclass(frozen=True)
class _Step:
    """A step as it starts, with all that computing it again needs."""

    module: "DetectionModule"
    batch: Sequence[MicroBatch]
    num_boxes: float
    number: int  # 1 for the first of a run, as in train.csv
    seed: int
    autocast: str | None  # "bfloat16", "float16"
    norms: NormStatistics

    @classmethod
    def of(cls, module: "DetectionModule", batch: Sequence[MicroBatch], num_boxes: float) -> "_Step":
        kind = module.device.type
        autocast = (
            str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else None
        )
        seed = sample_seed(module.seed, module.global_step, module.global_rank)
        norms = NormStatistics(module.model)
        return cls(module, batch, num_boxes, module.global_step + 1, seed, autocast, norms)


def agree(flags: Tensor) -> list[bool]:
    """Element by element, whether any process says so: (n,) bool, with one all-reduce and one copy to the host."""
    if dist.is_available() and dist.is_initialized():
        flags = flags.to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def module_of(trace: TracebackType | None, model: nn.Module) -> str | None:
    """The innermost module of `model` in whose forward an exception was raised."""
    names = {id(module): name for name, module in model.named_modules() if name}
    innermost = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        innermost = names.get(id(owner), innermost)
        trace = trace.tb_next
    return innermost


def run_bundles(run: Path) -> list[Path]:
    """The bundles of a run, oldest step first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if (path / "bundle.json").is_file())


def _make_room(folder: Path, name: str) -> None:
    """At most `MAX_BUNDLES` with the new one: the first ones, where it began, stay."""
    others = sorted(path for path in folder.glob("step-*") if path.name != name)
    for path in others[MAX_BUNDLES - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def _diagnosed(now: _Step, loss_scale: float) -> tuple[NotFinite | None, str]:
    """What is not finite first, or why nothing is known about it."""
    module = now.module
    try:
        found = find_non_finite(
            module.model, module.criterion, now.batch, now.num_boxes, seed=now.seed, loss_scale=loss_scale
        )
        return found, ""
    except Exception as error:  # whatever a broken step does when it is computed again
        return None, f"computing the step again to find the place failed ({type(error).__name__}: {error})"


def _gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _image_ids(batch: Sequence[MicroBatch]) -> list[int]:
    return [int(target["image_id"]) for _, _, targets in batch for target in targets]


def _repaired_costs(module: "DetectionModule") -> int:
    return module.criterion.matcher.num_repaired


def _header(now: _Step, config: Mapping[str, Any], annotations: Annotations | None) -> dict[str, Any]:
    module, device = now.module, now.module.device
    optimizer = module.optimizers()
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    return {
        "format": FORMAT,
        "step": now.number,
        "epoch": module.current_epoch,
        "rank": module.global_rank,
        "world_size": module.trainer.world_size,
        "seed": module.seed,
        "step_seed": now.seed,
        "num_boxes": now.num_boxes,
        "images": _images(now.batch, annotations),
        "categories": [] if annotations is None else [c.name for c in annotations.categories],
        "model": portable_config(module.model.config),
        "frozen": [name for name, parameter in module.model.named_parameters() if not parameter.requires_grad],
        "loss": None,
        "loss_weights": asdict(module.criterion.loss_weights),
        "optim": asdict(module.optim),
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        "autocast": now.autocast,
        "channels_last": _is_channels_last(module.model.backbone),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "matmul_precision": matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "versions": versions(),
        "config": dict(config),
    }


def matmul_precision() -> str | None:
    """PyTorch's choice for float32 matrix products; None inside `onednn_matmuls`, where it has no one name."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def versions() -> dict[str, str]:
    found = {"ddetr": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "numpy", "scipy", "lightning"):
        found[package] = importlib.metadata.version(package)
    return found


def _images(batch: Sequence[MicroBatch], annotations: Annotations | None) -> list[dict[str, Any]]:
    """What image stands where in the batch; its file where the annotations are at hand."""
    wanted = set(_image_ids(batch))
    paths = {} if annotations is None else {r.image_id: str(r.path) for r in annotations.images if r.image_id in wanted}
    return [
        {
            "micro_batch": index,
            "row": row,
            "image_id": int(target["image_id"]),
            "path": paths.get(int(target["image_id"])),
        }
        for index, (_, _, targets) in enumerate(batch)
        for row, target in enumerate(targets)
    ]


def _state(now: _Step, scaler: dict[str, Any] | None) -> dict[str, Any]:
    module = now.module
    python = random.getstate()
    numpy = np.random.get_state()
    cuda = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(now.seed)  # as the step started
        drawn = {"torch": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device) for device in cuda]}
    return {
        "batch": [
            {
                "images": images.cpu(),
                "mask": None if mask is None else mask.cpu(),
                "targets": [_on_cpu(t) for t in targets],
            }
            for images, mask, targets in now.batch
        ],
        "weights": _on_cpu(module.model.state_dict()),
        "optimizer": module.optimizers().state_dict(),
        "scaler": scaler,
        "random": drawn
        | {"python": [python[0], list(python[1]), python[2]]}
        | {"numpy": [str(numpy[0]), [int(n) for n in numpy[1]], int(numpy[2]), int(numpy[3]), float(numpy[4])]},
    }


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _is_channels_last(module: nn.Module) -> bool:
    kernels = [p for p in module.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    return bool(kernels) and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def _plain(value: Any) -> Any:
    """The same with "nan" and "inf" for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _in_words(header: Mapping[str, Any]) -> str:
    lines = [header["what"], ""]
    if found := header["not_finite"]:
        lines += [f"First place that is not finite: {found['place']} {found['name']} {found['kind']}".rstrip(), ""]
    lines += [
        f"micro-batch {i['micro_batch']}, image {i['row']}: id {i['image_id']}  {i['path'] or ''}"
        for i in header["images"]
    ]
    lines += ["", f"epoch {header['epoch']}, seed {header['seed']}, process {header['rank']} of {header['world_size']}"]
    lines += [", ".join(f"{name} {version}" for name, version in header["versions"].items())]
    if header.get("error"):
        lines += ["", header["error"]["traceback"]]
    return "\n".join(lines) + "\n"
