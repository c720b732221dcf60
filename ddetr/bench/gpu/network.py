"""Stage 4: the whole detector with ResNet-50 at 800 x 1066: as it is, optimized, captured in a CUDA graph, compiled;
beside transformers' network of the same sizes."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.peak import Peak, in_words
from ddetr.inference.optimize import optimize_model
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.precision import numerics

NETWORKS = {"two-stage": {"with_box_refine": True, "two_stage": True}, "plain": {}}
SMALL = {"backbone": "test_resnet", "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "num_queries": 12}
_COLUMNS = ("network", "batch", "side", "p50 ms", "p90 ms", "p99 ms", "images/s", "peak memory", "times transformers")
_SECONDS = 0.6  # of calls that are timed for a row
_LEAST, _MOST = 3, 60  # calls
_COMPILE_SECONDS = 25
_ONCE = ("transformers, TF32", "float32", "TF32, optimized")  # for one image only

Run = Callable[[Tensor], Any]


def run(sheet: Sheet, place: Place) -> None:
    """The stage: one image first, what is compiled last."""
    sheet.data["rows"] = []
    for batch, name in itertools.product((1,) if place.small else (1, 8), NETWORKS):
        torch.manual_seed(0)
        model = _network(NETWORKS[name], place).to(place.device).eval()
        images = torch.randn(batch, 3, *((64, 96) if place.small else (800, 1066)), device=place.device)
        for side, make in _sides(model).items():
            if batch > 1 and side in _ONCE:
                continue
            with sheet.part(f"{name}, batch {batch}, {side}", seconds=0 if place.small else 3) as go:
                if go:
                    _row(sheet, place, (name, batch, side), make, images)
    if not place.on_gpu:
        sheet.skip("TF32, CUDA graphs, torch.compile", "they are for GPUs")
        return
    with sheet.part("two-stage, batch 1, compiled", seconds=_COMPILE_SECONDS) as go:
        if go:
            model = _network(NETWORKS["two-stage"], place).to(place.device).eval()
            images = torch.randn(1, 3, 800, 1066, device=place.device)
            _row(sheet, place, ("two-stage", 1, "compiled"), lambda: (optimize_model(model, "compile"), False), images)


def _network(options: dict[str, Any], place: Place) -> DeformableDETR:
    model = {"num_classes": 91, "pretrained_backbone": False} | options
    return DeformableDETR(**model | (SMALL if place.small else {}))


def _sides(model: DeformableDETR) -> dict[str, Callable[[], tuple[Run, bool]]]:
    """Each gives the function that is timed, and whether TF32 is allowed."""
    on_gpu = next(model.parameters()).is_cuda

    @functools.cache
    def like_ours() -> nn.Module:
        from ddetr.bench.huggingface import network_like

        return network_like(model).eval().to(next(model.parameters()).device)

    def theirs(dtype: torch.dtype | None) -> Run:
        network = like_ours()
        return lambda images: network(pixel_values=images) if dtype is None else _autocast(network, images, dtype)

    sides: dict[str, Callable[[], tuple[Run, bool]]] = {
        "transformers, float32": lambda: (theirs(None), False),
        "transformers, bfloat16": lambda: (theirs(torch.bfloat16), False),
        "float32": lambda: (model, False),
        "float32, optimized": lambda: (optimize_model(model, "float32"), False),
        "bfloat16": lambda: (optimize_model(model, "bfloat16"), False),
    }
    if on_gpu:
        sides |= {
            "transformers, TF32": lambda: (theirs(None), True),
            "TF32, optimized": lambda: (optimize_model(model, "float32"), True),
            "float32, optimized, CUDA graph": lambda: (Graph(optimize_model(model, "float32")), False),
            "TF32, optimized, CUDA graph": lambda: (Graph(optimize_model(model, "float32")), True),
            "bfloat16, CUDA graph": lambda: (Graph(optimize_model(model, "bfloat16")), False),
        }
    return sides


def _autocast(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Any:
    with torch.autocast(images.device.type, dtype):
        return network(pixel_values=images)


class Graph:
    """A network captured once for images of one size, then launched as a whole."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Any:
        if self.graph is None:
            self._capture(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs

    def _capture(self, images: Tensor) -> None:
        self.images = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at a first call must not be in the graph
            for _ in range(3):
                self.model(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.model(self.images)
        other = images.flip(-1).contiguous()
        expected = self.model(other)["pred_logits"].clone()
        got = self(other)["pred_logits"]
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
            raise RuntimeError("the graph gives other logits than the network that it was made from")


def _row(sheet: Sheet, place: Place, key: tuple, make: Callable[[], tuple[Run, bool]], images: Tensor) -> None:
    """Time of each call from its start to its last result, as a user waits for it."""
    with torch.inference_mode():
        function, tf32 = make()
        peak = Peak(place.device)
        if place.on_gpu:
            torch.cuda.empty_cache()
        with numerics(deterministic=False, tf32=tf32):
            peak.start()  # with the first calls: a graph's replay allocates nothing
            for _ in range(2):
                function(images)
            times = sorted(_times(function, images, place, 0 if place.small else _SECONDS))
    name, batch, side = key
    p50, p90, p99 = (times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.9, 0.99))
    row = {"network": name, "batch": batch, "side": side, "calls": len(times), "p50_ms": p50, "p90_ms": p90}
    row |= {"p99_ms": p99, "images_per_s": 1000 * batch / statistics.mean(times), "peak_bytes": peak.bytes()}
    sheet.data["rows"].append(row)
    sheet.table("Inference", _COLUMNS, [_cells(row, sheet.data["rows"]) for row in sheet.data["rows"]])


def _times(function: Run, images: Tensor, place: Place, seconds: float) -> list[float]:
    wait = torch.cuda.synchronize if place.on_gpu else lambda: None
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() - begin < seconds):
        wait()
        start = time.perf_counter()
        function(images)
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The ratio is to transformers' at the same precision."""
    precision = row["side"].removeprefix("transformers, ").split(",")[0].replace("compiled", "bfloat16")
    base = next(
        (
            other["p50_ms"]
            for other in rows
            if other["side"] == f"transformers, {precision}"
            and (other["network"], other["batch"]) == (row["network"], row["batch"])
        ),
        None,
    )
    ratio = "-" if base is None else f"{base / row['p50_ms']:.2f}x"
    memory = in_words(row["peak_bytes"])
    times = (f"{row[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms"))
    return [row["network"], str(row["batch"]), row["side"], *times, f"{row['images_per_s']:.1f}", memory, ratio]
