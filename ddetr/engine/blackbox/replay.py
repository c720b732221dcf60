"""A recorded step computed again: does the failure repeat, where does it begin, and on which images?"""

import math
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from ddetr.boxes import box_cxcywh_to_xyxy
from ddetr.checkpoint.published import colors_in
from ddetr.engine.blackbox.bundle import matmul_precision, module_of, versions
from ddetr.engine.blackbox.reading import read_bundle
from ddetr.engine.blackbox.trace import NormStatistics, NotFinite, find_non_finite, non_finite_parameters
from ddetr.engine.config import OptimConfig
from ddetr.engine.optimizer import build_optimizer
from ddetr.engine.step import MicroBatch, model_outputs, on_device, step_losses
from ddetr.errors import InputError
from ddetr.files import write_folder_atomically
from ddetr.inference.drawing import draw_boxes
from ddetr.models.auxiliary import AuxiliaryConfig, attach_auxiliary
from ddetr.models.criterion import LossWeights, SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion, check_fits
from ddetr.printable import one_line
from ddetr.runtime.device import choose_device
from ddetr.runtime.limits import available_cores
from ddetr.runtime.precision import onednn_matmuls
from ddetr.untrusted import MAX_MESSAGE

PICTURE_SIDE = 320


@dataclass(frozen=True)
class Replay:
    """What came of computing a recorded step again."""

    what: str  # what had happened
    reproduces: bool
    verdict: str  # in words, with the reason where it does not
    loss: float | None
    recorded_loss: float | None
    is_same_loss: bool | None  # bit for bit; None where no loss was recorded
    not_finite: NotFinite | None
    anomaly: str | None  # what PyTorch's anomaly detection says
    pictures: list[Path]
    no_pictures: str | None = None  # why there are none, where they could not be written

    def render(self) -> str:
        lines = [f"recorded     {self.what}", f"replayed     {self.verdict}"]
        if self.recorded_loss is not None:
            same = "the same, bit for bit" if self.is_same_loss else "not the same"
            lines.append(f"loss         recorded {self.recorded_loss!r}, replayed {self.loss!r}: {same}")
        if self.not_finite is not None:
            found = self.not_finite
            lines.append(f"not finite   {found.place} {found.name} {found.kind}".rstrip() + f": {found.message}")
            lines += [f"  went in    {_described(one)}" for one in found.inputs]
            lines += [f"  came out   {_described(one)}" for one in found.outputs]
        if self.anomaly:
            lines.append(f"anomaly      {self.anomaly}")
        lines += [f"picture      {path}" for path in self.pictures]
        if self.no_pictures:
            lines.append(f"no pictures  {self.no_pictures}")
        return "\n".join(one_line(line, MAX_MESSAGE) for line in lines)


def replay(bundle: str, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> Replay:
    """Compute the step of a bundle again, with model, optimiser and batch as they were before it.

    Args:
        bundle: folder that a failed step left, for instance runs/NAME/blackbox/step-000123.
        device: "auto" takes the kind of device that the step failed on, where there is one.

    Raises:
        InputError: no bundle, or a damaged one.
    """
    folder = Path(bundle)
    header, state = read_bundle(folder)
    chosen = choose_device("cpu" if device == "auto" and header["device"] == "cpu" else device)
    model, criterion, optimizer = _rebuilt(header, state, chosen)
    batch = [on_device((micro["images"], micro["mask"], micro["targets"]), chosen) for micro in state["batch"]]
    recorded = None if header["loss"] is None else float(header["loss"])
    with _as_it_ran(header, chosen):
        norms = NormStatistics(model)
        outcome = _computed(model, criterion, batch, header, state["scaler"])
        norms.restore()
        found, anomaly = _traced(model, criterion, batch, header, state["scaler"])
        norms.restore()
        suspects = _suspects(model, batch, header)
        norms.restore()
        if outcome.error is None and not outcome.is_bad:
            try:
                optimizer.step()
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"replay: the bundle is damaged: its optimiser cannot step ({error})") from error
            if broken := non_finite_parameters(model):
                outcome.words = f"loss and gradient are finite, but the update leaves {broken[0]} not finite"
                outcome.is_bad = True
    pictures, no_pictures = _draw(folder, header, batch, suspects)
    is_same = None if recorded is None or outcome.loss is None else _same_bits(recorded, outcome.loss)
    reproduces, verdict = _verdict(header, outcome, chosen)
    return Replay(
        what=header["what"],
        reproduces=reproduces,
        verdict=verdict,
        loss=outcome.loss,
        recorded_loss=recorded,
        is_same_loss=is_same,
        not_finite=found,
        anomaly=anomaly,
        pictures=pictures,
        no_pictures=no_pictures,
    )


@dataclass
class _Outcome:
    loss: float | None = None
    grad_norm: float | None = None
    error: str | None = None  # type of the exception
    module: str | None = None
    words: str = ""
    is_bad: bool = False  # loss, gradient or updated weights are not finite


def _computed(
    model: DeformableDETR, criterion: SetCriterion, batch: Sequence[MicroBatch], header: Mapping[str, Any], scaler: Any
) -> _Outcome:
    """The step as it ran, without any hook; gradients are left in the model."""
    scale = scaler["scale"] if scaler else 1.0
    outcome, total = _Outcome(), 0.0
    torch.manual_seed(header["step_seed"])
    try:
        for micro_batch in batch:
            loss = criterion.total(step_losses(model, criterion, micro_batch, header["num_boxes"]))
            (loss * scale).backward()
            total = total + loss.detach()
    except Exception as error:
        outcome.error, outcome.module = type(error).__name__, module_of(error.__traceback__, model)
        outcome.words = f"{type(error).__name__}: {error}"
        return outcome
    outcome.loss = float(total)
    gradients = [p.grad / scale for p in model.parameters() if p.grad is not None]
    outcome.grad_norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    outcome.is_bad = not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm))
    outcome.words = f"loss {outcome.loss} and gradient norm {outcome.grad_norm}"
    return outcome


def _traced(
    model: DeformableDETR, criterion: SetCriterion, batch: Sequence[MicroBatch], header: Mapping[str, Any], scaler: Any
) -> tuple[NotFinite | None, str | None]:
    """The first place that is not finite, and what anomaly detection says of the backward pass."""
    seed, num_boxes = header["step_seed"], header["num_boxes"]
    scale = scaler["scale"] if scaler else 1.0
    try:
        found = find_non_finite(model, criterion, batch, num_boxes, seed=seed, loss_scale=scale)
    except Exception:  # the crash itself, which `_computed` has told
        return None, None
    if found is None or found.place != "backward":
        return found, None
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow, and the trace that the exception stands for
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                for micro_batch in batch:
                    total = criterion.total(step_losses(model, criterion, micro_batch, num_boxes))
                    parameters = [p for p in model.parameters() if p.requires_grad]
                    torch.autograd.grad(total * scale, parameters, allow_unused=True)
        except RuntimeError as error:
            return found, str(error).splitlines()[0]
    return found, None


def _suspects(model: DeformableDETR, batch: Sequence[MicroBatch], header: Mapping[str, Any]) -> set[tuple[int, int]]:
    """(micro-batch, row) of the images that differ from the others: in pixels, boxes or what the model makes of
    them."""
    suspects = set()
    for index, micro_batch in enumerate(batch):
        images, _, targets = micro_batch
        for row, target in enumerate(targets):
            boxes = target["boxes"]
            is_odd = not bool(torch.isfinite(images[row].float()).all() & torch.isfinite(boxes).all())
            if is_odd or bool((boxes[:, 2:] <= 0).any() | (boxes < 0).any() | (boxes > 1).any()):
                suspects.add((index, row))
        try:
            with torch.no_grad():
                outputs = model_outputs(model, micro_batch)
        except Exception:
            continue
        for row in range(len(targets)):
            if not all(bool(torch.isfinite(outputs[name][row]).all()) for name in ("pred_logits", "pred_boxes")):
                suspects.add((index, row))
    return suspects


def _verdict(header: Mapping[str, Any], outcome: _Outcome, device: torch.device) -> tuple[bool, str]:
    crash = header.get("error")
    if crash:
        reproduces = outcome.error == crash["type"]
    else:
        reproduces = outcome.is_bad
    place = f" in {outcome.module}" if outcome.module else ""
    verdict = f"the failure {'repeats' if reproduces else 'does not repeat'}{place}: {outcome.words}"
    now = versions()
    reasons = [
        f"{name} was {version} and is {now.get(name)}"
        for name, version in header["versions"].items()
        if now.get(name) != version and name in ("torch", "ddetr")
    ]
    if header["device"] != device.type:
        reasons.insert(0, f"the step ran on {header['device']} and now on {device.type}")
    elif device.type == "cuda" and header["device_name"] != torch.cuda.get_device_name(device):
        reasons.insert(0, f"the step ran on {header['device_name']}, here is {torch.cuda.get_device_name(device)}")
    elif device.type == "cpu" and header["device_name"] != (platform.processor() or "cpu"):
        reasons.insert(0, f"the step ran on {header['device_name']}")
    if _threads(header) != header["threads"]:
        reasons.append(f"the step had {header['threads']} threads, here are {_threads(header)}")
    if reasons:
        verdict += f" (equal bits are not to be expected: {'; '.join(reasons)})"
    return reproduces, verdict


def _same_bits(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _rebuilt(
    header: Mapping[str, Any], state: Mapping[str, Any], device: torch.device
) -> tuple[DeformableDETR, SetCriterion, torch.optim.Optimizer]:
    config = {**header["model"], "pretrained_backbone": False}  # nothing is fetched, and no file but the bundle read
    try:
        check_fits(config, state["weights"])
        model = DeformableDETR(**config)
        if header.get("auxiliary"):
            attach_auxiliary(model, AuxiliaryConfig(**header["auxiliary"]))
        model.load_state_dict(state["weights"], strict=True)
        model.image_mean, model.image_std = colors_in(header)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"replay: the model of the bundle, made by ddetr {header['versions']['ddetr']}, is not one of this "
            f"version: {one_line(str(error).partition(chr(10))[0], MAX_MESSAGE // 2)}"
        ) from error
    if header["channels_last"]:
        model.backbone.to(memory_format=torch.channels_last)
    named = dict(model.named_parameters())
    try:
        for name in header["frozen"]:
            named[name].requires_grad_(False)
        model.to(device).train()
        # The recorded state brings rates and all other numbers of each group.
        groups = [{"params": [named[name] for name in names]} for names in header["groups"]]
        optimizer = build_optimizer(groups, OptimConfig(sgd=header["optimizer"] == "SGD"), fused=False)
        optimizer.load_state_dict(state["optimizer"])
        criterion = build_criterion(model, LossWeights(**header["loss_weights"]))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"replay: the bundle is damaged: optimiser, losses and model do not fit ({type(error).__name__}: {error})"
        ) from error
    return model, criterion, optimizer


def _threads(header: Mapping[str, Any]) -> int:
    """As many as the step had, since sums depend on them, but no more than this machine can start."""
    return min(header["threads"], 8 * available_cores())


@contextmanager
def _as_it_ran(header: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Precision, threads and determinism of the recorded step; afterwards they are as before."""
    before = torch.get_num_threads(), matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(_threads(header))
    if header["matmul_precision"]:
        torch.set_float32_matmul_precision(header["matmul_precision"])
    torch.use_deterministic_algorithms(header["deterministic"])
    kind = header["autocast"]
    autocast = torch.autocast(device.type, getattr(torch, kind), cache_enabled=False) if kind else nullcontext()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda), onednn_matmuls(), autocast:
            yield
    finally:
        torch.set_num_threads(before[0])
        if header["matmul_precision"] and before[1]:
            torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(before[2])


def _draw(
    folder: Path, header: Mapping[str, Any], batch: Sequence[MicroBatch], suspects: set[tuple[int, int]]
) -> tuple[list[Path], str | None]:
    """images/N-N-ID.png of the suspects with their boxes, or of all images where none stands out; and why there are
    none where they could not be written. Whatever `images` was before, nothing is written through a link."""
    drawn: dict[str, Image.Image] = {}
    for place in header["images"]:
        index, row, image_id = place["micro_batch"], place["row"], place["image_id"]
        if (suspects and (index, row) not in suspects) or index >= len(batch) or row >= len(batch[index][2]):
            continue
        images, mask, targets = batch[index]
        one_mask = None if mask is None else mask[row].cpu()
        picture = _drawn(images[row].cpu(), one_mask, targets[row], header["categories"])
        drawn[f"{index}-{row}-{image_id}.png"] = to_pil_image(picture)
    path = folder / "images"
    if not drawn:
        return [], None
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        return [], f"{path} is a link or a file; remove it"

    def write(temporary: Path) -> None:
        for name, picture in drawn.items():
            picture.save(temporary / name, format="PNG")

    try:
        write_folder_atomically(path, write)
    except OSError as error:
        return [], f"{path} cannot be written ({error.strerror or error}); copy the bundle elsewhere"
    return [path / name for name in drawn], None


def _drawn(image: Tensor, mask: Tensor | None, target: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    if mask is not None:
        height, width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
        image = image[:, : height or None, : width or None]  # all of one that says it is padding alone
    if image.dtype != torch.uint8:
        image = torch.nan_to_num(image.float()).clamp(0, 255).to(torch.uint8)
    height, width = image.shape[1:]
    boxes_xyxy = box_cxcywh_to_xyxy(target["boxes"].cpu()) * torch.tensor([width, height, width, height])
    labels = target["labels"].tolist()
    tags = [names[label] if 0 <= label < len(names) else f"class {label}" for label in labels]
    return draw_boxes(image, boxes_xyxy, labels, tags, min_side=PICTURE_SIDE)


def _described(one: Mapping[str, Any]) -> str:
    numbers = (
        "nothing finite" if one["min"] is None else f"{one['min']:.4g} to {one['max']:.4g}, mean {one['mean']:.4g}"
    )
    return f"{one['dtype']} {tuple(one['shape'])}: {numbers}; {one['num_nan']} NaN, {one['num_inf']} infinite"
