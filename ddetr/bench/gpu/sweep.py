"""Stage 3: which cut of the Triton kernels is the fastest, per head size, dtype and number of queries.

Every candidate is compared with the reference in float64 first. The result is a table for people and `LAUNCHES` of
ddetr/ops/triton_kernels.py, to be pasted there.
"""

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.op import COMPARED, TOLERANCE, Truth, name_of, true_step
from ddetr.bench.sides import reason_of
from ddetr.bench.sizes import Inputs, Size, make_inputs, pyramid
from ddetr.bench.timing import Clock, cuda_clock, interleaved
from ddetr.runtime.limits import available_cores

if TYPE_CHECKING:
    from ddetr.ops.triton_kernels import Launch

_QUICK, _LONG, _BEST = 3, 15, 3  # rounds of all candidates, and of the best few
_COLUMNS = ["layer", "kernel", "D", "dtype", "today", "ms", "best", "ms", "gain", "idea", "ms"]


class Cell(NamedTuple):
    """A layer for which the cuts are compared."""

    name: str
    queries: int  # 0: one for each cell
    head_size: int
    dtype: torch.dtype


class Timed(NamedTuple):
    """A way to compute a layer forward or backward; `launch` is None for an idea, which the table cannot hold."""

    call: Callable[[], Any]
    launch: "Launch | None"


class Case(NamedTuple):
    """A kernel to compile, for encoder and decoder alike."""

    backward: bool
    head_size: int
    dtype: torch.dtype
    number: int  # among its ways


# In order of weight, since time may run out.
CELLS = [
    Cell(name, queries, head_size, dtype)
    for head_size, dtypes in (
        (32, (torch.bfloat16, torch.float32)),
        (16, (torch.bfloat16, torch.float32)),
        (64, (torch.bfloat16, torch.float32)),
        (32, (torch.float16,)),
    )
    for name, queries in (("encoder", 0), ("decoder", 300))
    for dtype in dtypes
]


def run(sheet: Sheet, where: Place) -> None:
    """The stage: all cuts and ideas timed on a GPU; in a rehearsal, in Triton's interpreter, only their values."""
    if importlib.util.find_spec("triton") is None:
        sheet.skip("sweep of the Triton kernels", "Triton is not installed")
        return
    if where.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        sheet.skip("sweep of the Triton kernels", "there is no CUDA device, and TRITON_INTERPRET is not 1")
        return
    cells = [Cell("decoder", 3, 16, torch.float32)] if where.small else CELLS
    shapes = [(6, 8), (3, 4), (2, 2)] if where.small else pyramid(800, 1066)
    clock = cuda_clock(where.device) if where.device.type == "cuda" else None
    found: dict[Any, Launch] = {}
    rows: list[list[Any]] = []
    sheet.data["sweep"] = []
    compiling = Compiling(cells, where)
    compiling.wait_for(None, sheet.left() / 2)  # what runs beside a measurement disturbs it
    for cell in cells:
        compiling.wait_for(cell, sheet.left())
        size = Size(1 if where.small else 4, shapes, cell.queries, 1 if where.small else 8, cell.head_size)
        slowest = max((row["seconds"] for row in sheet.data["sweep"]), default=0.0)
        if sheet.left() < 1.5 * slowest:
            sheet.skip(f"{cell.name}, D {cell.head_size}, {name_of(cell.dtype)}", "no time is left")
            continue
        with sheet.part(f"{cell.name}, D {cell.head_size}, {name_of(cell.dtype)}"):
            _sweep_cell(sheet, cell, size, where, clock, rows, found)
        if rows:
            sheet.table("Triton kernels: today's cut and the best", _COLUMNS, rows)
            sheet.table(
                "To be pasted into ddetr/ops/triton_kernels.py", ["line"], [[x] for x in literal(found).split("\n")]
            )
    compiling.end()
    with sheet.part("what a call costs the host"):
        _host(sheet, where)


class Compiling:
    """Compiles the kernels of all cells in processes beside this one, which finds them in Triton's cache on disk: a
    kernel takes about a second, most of which holds Python's lock."""

    def __init__(self, cells: list[Cell], where: Place):
        cases = {}
        for cell in cells:
            for backward in (False, True):
                for number in range(len(_tiny_ways(backward, cell.head_size, cell.dtype, where.device, where.small))):
                    cases[Case(backward, cell.head_size, cell.dtype, number)] = None
        if where.device.type != "cuda":
            self.pool, self.futures = None, {}
            compile_case(next(iter(cases)), where.device, where.small)
            return
        self.pool = ProcessPoolExecutor(min(available_cores(), 16), mp_context=get_context("spawn"))
        self.futures: dict[Case, Future] = {
            case: self.pool.submit(compile_case, case, where.device, where.small) for case in cases
        }

    def wait_for(self, cell: Cell | None, seconds: float) -> None:
        """Until all kernels of the cell (of all cells) are there; one that does not compile is found out later."""
        wait([f for c, f in self.futures.items() if cell is None or c[1:3] == (cell.head_size, cell.dtype)], seconds)

    def end(self) -> None:
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


def compile_case(case: Case, device: torch.device, few: bool) -> None:
    """Runs it on tiny inputs: what a kernel is compiled for does not depend on the number of images, cells and
    queries, but on whether 16 divides it."""
    with suppress(Exception):  # where it matters it is run again and told
        _tiny_ways(case.backward, case.head_size, case.dtype, device, few)[case.number].call()


def _tiny_ways(backward: bool, head_size: int, dtype: torch.dtype, device: torch.device, few: bool) -> list[Timed]:
    size = Size(2, [(5, 7), (3, 3), (2, 2), (1, 1)], 0, 1 if few else 8, head_size)  # 1 would be compiled as 1
    inputs = make_inputs(size, device, dtype)
    grad_output = torch.ones(1, size.num_queries, size.heads * head_size, dtype=dtype, device=device)
    return [way for _, way in _ways(backward, size, inputs, grad_output, few)]


def _host(sheet: Sheet, where: Place) -> None:
    from ddetr.bench.gpu.launch import LIMIT_US, launch_overhead

    found = sheet.data["host_us"] = launch_overhead(where.device, 20 if where.small else 200)
    rows = [[what, f"{microseconds:.1f}"] for what, microseconds in found.items()]
    sheet.table(
        f"What a call of the operator costs the host (limit {LIMIT_US} µs, without the launcher)", ["", "µs"], rows
    )


def _sweep_cell(
    sheet: Sheet,
    cell: Cell,
    size: Size,
    where: Place,
    clock: Clock | None,
    rows: list[list[Any]],
    found: dict[Any, Any],
) -> None:
    from ddetr.ops.triton_kernels import MANY, Kind, channels_of, launch_of

    began = sheet.left()
    inputs = make_inputs(size, where.device, cell.dtype)
    truth = true_step(size, inputs)
    many = size.batch * size.num_queries >= MANY
    for backward in (False, True):
        title = f"{cell.name}, D {cell.head_size}, {name_of(cell.dtype)}, {'backward' if backward else 'forward'}"
        ways = dict(_ways(backward, size, inputs, truth.grad_output, where.small))
        good = _right_ones(sheet, title, ways, truth, backward, TOLERANCE[cell.dtype], where)
        today = launch_of(backward, cell.head_size, cell.dtype, many)[1]
        if clock is None or _label(today) not in good:
            continue
        times = {name: statistics.median(t) for name, t in _time(good, clock, _label(today)).items()}
        cuts = {name: ms for name, ms in times.items() if good[name].launch is not None}
        others = {name: ms for name, ms in times.items() if good[name].launch is None}
        best = min(cuts, key=cuts.__getitem__)
        idea = min(others, key=others.__getitem__, default=None)
        ms = times[_label(today)]
        rows.append(
            [cell.name, "backward" if backward else "forward", cell.head_size, name_of(cell.dtype), _label(today)]
            + [f"{ms:.3f}", best, f"{cuts[best]:.3f}", f"{ms / cuts[best]:.2f} x"]
            + ([idea, f"{others[idea]:.3f}"] if idea else ["", ""])
        )
        found[Kind(backward, channels_of(cell.head_size), cell.dtype, many)] = good[best].launch
        sheet.data["sweep"].append({"cell": title, "ms": times, "seconds": 0.0})
    if sheet.data["sweep"]:
        sheet.data["sweep"][-1]["seconds"] = began - sheet.left()


def candidates(backward: bool, channels: int) -> list["Launch"]:
    """Cuts worth timing; none spills registers at the sizes of `CELLS`, which a test asserts."""
    from ddetr.ops.triton_kernels import Launch, default_launch

    found = [default_launch(channels)]
    for values in (4, 8) if backward else (8, 16):  # of each corner that a thread holds
        for warps in (1, 2, 4, 8):
            for points in (1, 4):
                queries = values * 32 * warps // (channels * points)
                if 1 <= queries <= 64:
                    found.append(Launch(queries, points, warps))
    if not backward:  # there it spills
        found.append(Launch(max(1, 256 // channels), 4, 4, stages=2))
    found.append(default_launch(channels)._replace(evict="evict_last"))
    return list(dict.fromkeys(found))


def _ways(backward: bool, size: Size, inputs: Inputs, grad_output: Tensor, few: bool) -> Iterator[tuple[str, Timed]]:
    from ddetr.bench.gpu import ideas
    from ddetr.ops import triton_kernels
    from ddetr.ops.triton_kernels import Launch

    value, *rest = inputs
    flat = [length for hw in size.shapes for length in hw]
    channels = triton_kernels.channels_of(size.head_size)
    launches = candidates(backward, channels)
    for launch in [launches[0], *launches[-2:]] if few else launches:
        if backward:
            call = _bind(triton_kernels.backward, grad_output, value, flat, *rest, False, launch)
        else:
            call = _bind(triton_kernels.forward, value, flat, *rest, launch)
        yield _label(launch), Timed(call, launch)
    launch = Launch(max(1, 256 // channels), 4, 4)
    if backward:
        for copies in (4, 16):
            call = _bind(ideas.backward_in_copies, grad_output, value, flat, *rest, launch, copies)
            yield f"{copies} copies, {_label(launch)}", Timed(call, None)
    else:
        yield f"packed, {_label(launch)}", Timed(_bind(ideas.packed_forward, value, flat, *rest, launch), None)
        yield f"split, {_label(launch)}", Timed(_bind(ideas.packed_forward, value, flat, *rest, launch, True), None)


def _bind(function: Callable, *arguments: Any) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return call


def _right_ones(
    sheet: Sheet, title: str, ways: dict[str, Timed], truth: Truth, backward: bool, tolerance: float, where: Place
) -> dict[str, Timed]:
    """Those that run and give the reference's result; a line for each other one."""
    threads = available_cores() if where.device.type == "cuda" else 1
    with ThreadPoolExecutor(threads) as pool:  # each compiles its kernel
        started = {name: pool.submit(way.call) for name, way in ways.items()}
    good = {}
    for name, future in started.items():
        try:
            results = future.result()
        except Exception as error:  # compilers fail in every way there is
            sheet.say(f"{title}: {name} left out: {reason_of(error)}")
            continue
        results, expected, what = (
            (results[:3], truth.compared[1:], COMPARED[1:]) if backward else ((results,), truth.compared[:1], COMPARED)
        )
        errors = [((got.double() - want).abs().max() / want.abs().max()).item() for got, want in zip(results, expected)]
        wrong = [f"{part} is off by {e:.1e}" for part, e in zip(what, errors) if not e <= tolerance]
        if wrong:
            sheet.say(f"{title}: {name} left out: {', '.join(wrong)}")
        else:
            good[name] = ways[name]
    sheet.check(f"{title}: values", len(good) == len(ways), f"{len(good)} of {len(ways)} are right")
    return good


def _time(good: dict[str, Timed], clock: Clock, today: str) -> dict[str, list[float]]:
    """A quick pass over all, then the best few, today's cut and the ideas again for longer."""
    quick = interleaved({name: way.call for name, way in good.items()}, clock, _QUICK)
    ranked = sorted(good, key=lambda name: min(quick[name]))
    kept = {*ranked[:_BEST], today, *(name for name, way in good.items() if way.launch is None)}
    return interleaved({name: good[name].call for name in ranked if name in kept}, clock, _LONG)


def literal(found: dict[Any, "Launch"]) -> str:
    """`LAUNCHES` as ddetr/ops/triton_kernels.py holds it."""
    lines = []
    for kind, launch in found.items():
        key = f"Kind({kind.backward}, {kind.channels}, {kind.dtype}, {kind.many})"
        lines.append(f"    {key}: Launch({', '.join(map(repr, launch))}),")
    return "\n".join(["LAUNCHES: dict[Kind, Launch] = {", *lines, "}"])


def _label(launch: "Launch") -> str:
    """A cut in a few characters: queries x points, warps, and what else differs from none."""
    more = (f" s{launch.stages}" if launch.stages > 1 else "") + (" keep" if launch.evict else "")
    return f"{launch.queries}x{launch.points} w{launch.warps}{more}"
