"""The whole R50 detector on a CPU against transformers', with the same weights: `python benchmarks/bench_inference.py`.

Sides: transformers' eager, ours as it is, ours with each `optimize`, all on one image of 800x1066, wall time, interleaved,
medians; then a training step (forward, a plain loss on the outputs, backward) at 480x640 for transformers' and ours, the
latter as `ddetr train` runs it: backbone channels-last, matrix products by oneDNN.
`--compile` adds the compiled side, `--keep-freed-memory` sets the allocator for all sides, `--save FILE` writes the figures.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before PyTorch loads, for all sides, as the command line sets it

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

from ddetr.bench.record import describe, machine
from ddetr.bench.timing import cpu_clock, interleaved
from ddetr.checkpoint import load_weights
from ddetr.inference.optimize import optimize_model
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.allocator import keep_freed_memory
from ddetr.runtime.precision import onednn_matmuls


def make_models() -> tuple[nn.Module, DeformableDETR]:
    """transformers' R50 with random weights that make the queries differ, and ours with the same."""
    torch.manual_seed(0)
    backbone = TimmBackboneConfig(
        backbone="resnet50", features_only=True, out_indices=[2, 3, 4], use_pretrained_backbone=False
    )
    theirs = DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, num_labels=91)).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                tensor.normal_(0, 0.02)
            elif "reference_points.weight" in name:
                tensor.normal_(0, 0.3)
    ours = DeformableDETR(num_classes=91, freeze_backbone="stem").eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder, "pytorch_model.bin"))
        load_weights(ours, Path(folder, "pytorch_model.bin"))
    return theirs, ours


def medians(sides: dict[str, Callable[[], None]], threads: int, rounds: int) -> dict[str, float]:
    """Seconds of each side."""
    times = interleaved(sides, cpu_clock(threads), rounds)
    return {name: statistics.median(values) / 1000 for name, values in times.items()}


def inference(theirs: nn.Module, ours: DeformableDETR, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    images = torch.randn(1, 3, 800, 1066)
    mask = torch.ones(1, 800, 1066, dtype=torch.long)
    models: dict[str, nn.Module] = {"ours": ours}
    for optimization in ("float32", "bfloat16") + (("compile",) if options.compile else ()):
        models[f"ours, optimize={optimization}"] = optimize_model(ours, optimization)
    found: dict[str, Tensor] = {}

    def run_theirs() -> None:
        found["transformers"] = theirs(pixel_values=images, pixel_mask=mask).logits

    def run_ours(name: str) -> None:
        found[name] = models[name](images)["pred_logits"]

    sides: dict[str, Callable[[], None]] = {"transformers": run_theirs}
    sides |= {name: lambda name=name: run_ours(name) for name in models}
    with torch.inference_mode():
        seconds = medians(sides, options.threads, options.rounds)
    expected = found["transformers"]
    return {
        name: {"seconds": seconds[name], "logits_differ_by": (found[name] - expected).abs().max().item()}
        for name in sides
    }


def training(theirs: nn.Module, ours: DeformableDETR, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A step of all weights that the published recipe trains, dropout off so that both compute the same."""
    images = torch.randn(1, 3, 480, 640)
    mask = torch.ones(1, 480, 640, dtype=torch.long)
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    for name, parameter in theirs.named_parameters():
        if "backbone" in name and any(f".{part}." in name for part in ("conv1", "bn1", "layer1")):
            parameter.requires_grad_(False)
    assert frozen
    grads: dict[str, float] = {}

    def step(name: str, model: nn.Module, outputs: Callable[[], tuple[Tensor, Tensor]]) -> None:
        model.zero_grad(set_to_none=True)
        logits, boxes = outputs()
        (logits.square().mean() + boxes.square().mean()).backward()
        grads[name] = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5

    def their_outputs() -> tuple[Tensor, Tensor]:
        out = theirs(pixel_values=images, pixel_mask=mask)
        return out.logits, out.pred_boxes

    ours.backbone.to(memory_format=torch.channels_last)

    def our_step() -> None:
        with onednn_matmuls():
            step("ours", ours, our_outputs)

    def our_outputs() -> tuple[Tensor, Tensor]:
        out = ours(images)
        return out["pred_logits"], out["pred_boxes"]

    seconds = medians(
        {
            "transformers": lambda: step("transformers", theirs, their_outputs),
            "ours": our_step,
        },
        options.threads,
        options.rounds,
    )
    return {name: {"seconds": seconds[name], "gradient_norm": grads[name]} for name in seconds}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep-freed-memory", action="store_true")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    allocator = options.keep_freed_memory and keep_freed_memory()
    theirs, ours = make_models()
    here = machine(torch.device("cpu"))
    print(f"{describe(here)}; {options.threads} threads" + ("; freed memory is kept" if allocator else ""))
    results = {
        "inference, 800x1066, batch 1": inference(theirs, ours, options),
        "training step, 480x640, batch 1": training(theirs, ours, options),
    }
    for title, rows in results.items():
        print(f"\n{title}")
        base = rows["transformers"]["seconds"]
        for name, row in rows.items():
            more = ", ".join(f"{key} {value:.2e}" for key, value in row.items() if key != "seconds")
            print(f"  {name:28s} {row['seconds']:7.3f} s  {base / row['seconds']:6.2f}x   {more}")
    if options.save:
        report = {**here, "threads": options.threads, "keep_freed_memory": allocator, **results}
        options.save.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
