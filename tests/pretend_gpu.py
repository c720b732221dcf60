"""A GPU to pretend where there is none: its tensors lie in the host's memory, say that they are on cuda:0, and compute
there. What would make the host wait for a real one is noted, with the line of ddetr that asked for it.

Unlike tensors without data, these train: the matcher gets its numbers. As on a GPU, tensors of both kinds do not meet
in one operation. What a kernel of ours does inside is not seen.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import ddetr
from ddetr.runtime import transfer

GPU = torch.device("cuda:0")
aten = torch.ops.aten

# The size of what they return is a number that only the device knows.
_COUNTING = {
    *(aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten.unique_consecutive.default),
    *(aten._unique.default, aten._unique2.default, aten.unique_dim.default),
}
_INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default),
}
_COPYING = {aten._to_copy.default, aten.copy_.default, aten.copy.default}


class Wait(NamedTuple):
    """Where the host waits for the device, and why."""

    file: str  # of ddetr, "models/matcher.py"
    function: str
    line: int
    why: str

    @property
    def place(self) -> str:
        return f"{self.file} {self.function}: {self.why}"


class OnGPU(Tensor):
    """A tensor that says it is on a GPU. To PyTorch's C++ it is on the CPU: autograd has no queue for absent GPUs."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise AssertionError(f"{func} on a pretended GPU outside `pretend_gpu`")

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        args = (args[0].device, args[0].dtype, *args[1:]) if args and isinstance(args[0], Tensor) else args
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        dtype = dtype or self.dtype
        # PyTorch's own functions have their devices from C++, and want what they have to stay where it is.
        is_own = sys._getframe(1).f_code.co_filename.startswith(torch.__path__[0])
        if device is not None and device.type == "cpu" and not is_own:
            return aten._to_copy(self, dtype=dtype, device=device, non_blocking=non_blocking)
        return super().to(dtype, memory_format=memory_format or torch.preserve_format)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"OnGPU({self.held!r})"


class PretendGPU(TorchDispatchMode):
    """`waits`: where the host would have waited; `sent`: places of the copies to the device that need no wait, since
    they come from pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.sent: list[Wait] = []
        self._pinned: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    @property
    def places(self) -> list[str]:
        return [wait.place for wait in self.waits]

    def forget(self) -> None:
        self.waits.clear()
        self.sent.clear()

    def pin(self, tensor: Tensor) -> Tensor:
        """As the loader's thread pins a batch."""
        self._pinned[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            with torch._C._DisableTorchDispatch():
                return self.pin(args[0].clone())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wanted = kwargs.get("device")
        comes_in = any(isinstance(tensor, OnGPU) for tensor in tensors)
        if wanted is not None:
            # Gradients that are zero are made by C++, to which all of them are on the CPU.
            is_gradient = func is not aten._to_copy.default and torch._C._current_graph_task_id() != -1
            goes_out = torch.device(wanted).type == "cuda" or is_gradient
            kwargs["device"] = torch.device("cpu")
        else:
            goes_out = isinstance(args[0], OnGPU) if func is aten.copy_.default else comes_in
        if comes_in or goes_out:
            self._note(func, args, kwargs, tensors, goes_out)
        with torch._C._DisableTorchDispatch():
            results = func(*tree_map_only(OnGPU, _held, args), **tree_map_only(OnGPU, _held, kwargs))
            if func is aten._to_copy.default and results is args[0]:
                results = results.clone()
        if not goes_out:
            return results
        results = tree_map_only(Tensor, lambda one: one if isinstance(one, OnGPU) else OnGPU(one), results)
        return return_and_correct_aliasing(func, args, kwargs, results)

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], goes_out: bool) -> None:
        is_host = [not isinstance(tensor, OnGPU) for tensor in tensors]
        if func is aten._local_scalar_dense.default:
            self._wait("a number is read")
        elif func is aten.equal.default or func in _COUNTING:
            self._wait(func.overloadpacket.__name__)
        elif func is aten.repeat_interleave.Tensor:
            if kwargs.get("output_size") is None:
                self._wait("repeat_interleave")
        elif func in _INDEXING:
            indices = [one for one in args[1] if one is not None]
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                self._wait("a mask is an index")
            if any(is_host):
                self._wait("an index or a value comes from the host")
        elif func in _COPYING:
            source = args[0] if func is aten._to_copy.default else args[1]
            if not goes_out:
                self._wait("a copy to the host")
            elif not isinstance(source, OnGPU):
                non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
                if non_blocking and self.is_pinned(source):
                    self.sent.append(self._here("sent"))
                else:
                    self._wait("a copy to the device" + (" from memory that is not pinned" if non_blocking else ""))
        elif any(host and tensor.dim() > 0 for host, tensor in zip(is_host, tensors)):
            raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu, {self._here('')}")

    def _wait(self, why: str) -> None:
        self.waits.append(self._here(why))

    @staticmethod
    def _here(why: str) -> Wait:
        """The innermost line of ddetr, or else of whoever is there beside PyTorch."""
        root, mine, others = str(Path(ddetr.__file__).parent), (__file__, torch.__path__[0]), None
        frame = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(root) and file != transfer.__file__:
                return Wait(str(Path(file).relative_to(root)), frame.f_code.co_name, frame.f_lineno, why)
            if others is None and not file.startswith(mine):
                others = Wait(Path(file).name, frame.f_code.co_name, frame.f_lineno, why)
            frame = frame.f_back
        return others


def _held(tensor: OnGPU) -> Tensor:
    return tensor.held


class PretendAccelerator(CPUAccelerator):
    """For Lightning's `SingleDeviceStrategy(GPU, PretendAccelerator())`."""

    def setup_device(self, device: torch.device) -> None: ...


@contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """Inside the block `device="cuda"` works, for tensors, modules and Lightning's strategy."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's own memory can't move there
    try:
        # It makes PyTorch not ask for a driver; nothing reaches it.
        with FakeTensorMode(), PretendGPU() as gpu:
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
