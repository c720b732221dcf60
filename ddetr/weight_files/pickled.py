"""A pickle read without running it: plain values stay what they are, and every object of a class is a `StandIn`.

Files of weights carry more than tensors: configurations, paths, dates, counters of a training program. `pickle` would
import those classes and call them, PyTorch's own guarded reader refuses the whole file. Here nothing that a file names
is looked up or called: the operations are read by `pickletools` and done on a stack of our own, where "call this with
that" yields a description of a tensor for the few functions of `_MAKERS`, which are ours, and a stand-in for all
others. Each operation takes constant time and memory (nothing is hashed or copied that a file could make large).
"""

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ddetr.untrusted import MAX_AXES, MAX_BITS, MAX_OPERATIONS, MAX_STEP

# Nothing would be run, but a file that asks for these is an attack and no file of weights: its user should know.
_HOSTILE_MODULES = re.compile(
    r"(?:^|\.)(?:os|posix|nt|sys|subprocess|commands|shutil|socket|ctypes|importlib|runpy|pty|webbrowser)\."
)
_HOSTILE_BUILTINS = re.compile(
    r"(?:__builtin__|builtins)\.(?:eval|exec|execfile|compile|open|input|breakpoint|__import__)\b"
)
# What they return is a value in honest files (an item of an enumeration); an attack calls it.
_MAKES_FUNCTIONS = re.compile(r"(?:__builtin__|builtins)\.getattr$|_?operator\.\w+$|_?functools\.partial$")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class HostileFile(Exception):
    """The file asks for a function that starts programs or touches files: its name."""


class Global(NamedTuple):
    """A class or function that a file names; it is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class StandIn:
    """In the place of an object: the name of its class, and what the file would have given to it."""

    name: str
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


class StorageId(NamedTuple):
    """The numbers that a tensor looks at: which record of the file, and of what type."""

    key: str
    dtype: torch.dtype
    size: int  # elements, as far as the file says


@dataclass(eq=False)
class TensorView:
    """A tensor as a file describes it, None for what is no shape; whether its numbers are there is seen later."""

    storage: StorageId
    offset: int | None  # elements
    shape: tuple[int, ...] | None
    stride: tuple[int, ...] | None  # elements
    dtype: torch.dtype


def read_pickle(file: Any, storages: dict[str, "StorageId"] | None = None) -> Any:
    """The value of the pickle at the position of `file`, which then stands behind it.

    Args:
        file: of bytes, with `read`, `readline` and `tell`.
        storages: where to note what the tensors look at.

    Returns:
        Plain values, lists (of sets too), dicts (of all kinds of dict), `Global`, `StandIn` and `TensorView`.

    Raises:
        HostileFile: it asks for what no file of weights needs.
        ValueError, IndexError, KeyError and others: it is damaged.
    """
    machine = _Machine(storages)
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name == "STOP":
            return machine.stack.pop()
        if count > MAX_OPERATIONS:
            raise ValueError("more operations than any file of weights has")
        machine.do(operation.name, argument)
    raise ValueError("a pickle without an end")


def mapping_of(value: Any) -> Mapping[Any, Any] | None:
    """A dict, or what was put into an object of a class that is one (`Config`, `AttributeDict`, ...)."""
    if isinstance(value, dict):
        return value
    return value.items if isinstance(value, StandIn) and value.items else None


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_WITH_VALUE = frozenset(
    operation.name
    for operation in pickletools.opcodes
    if operation.name.startswith(("INT", "BININT", "LONG", "FLOAT", "BINFLOAT"))
    or operation.name.endswith(("STRING", "UNICODE", "UNICODE8", "BYTES", "BYTES8", "BYTEARRAY8"))
) - {"LONG_BINGET", "LONG_BINPUT"}


class _Machine:
    """The stack, and what each operation does to it."""

    def __init__(self, storages: dict[str, "StorageId"] | None) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _WITH_VALUE:
            is_huge = isinstance(argument, int) and argument.bit_length() > MAX_BITS
            stack.append(StandIn("builtins.int") if is_huge else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            getattr(self, f"_{name.lower()}")(argument)

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # Collections

    def _list(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(items)

    _frozenset = _list

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _tuple1(self, _: Any) -> None:
        self._last_as_tuple(1)

    def _tuple2(self, _: Any) -> None:
        self._last_as_tuple(2)

    def _tuple3(self, _: Any) -> None:
        self._last_as_tuple(3)

    def _last_as_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("a tuple of more than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append({})
        self._set(items)

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, _: Any) -> None:
        items = self._since_mark()
        self._extend(items)

    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        items = self._since_mark()
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, StandIn) else target
        for key, value in zip(items[::2], items[1::2]):
            # The hash of a tuple of tuples of the same tuples would take for ever, as would its text.
            if isinstance(target, dict) and isinstance(key, (str, int, float, bytes, type(None))):
                target[key] = value

    # Names, calls, and what they yield

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_checked(Global(module, name)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self.stack.append(_checked(Global(module, name)))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_called(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        items = self._since_mark()
        self.stack.append(_called(_checked(Global(module, name)), tuple(items)))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._since_mark()
        self.stack.append(_called(function, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], StandIn):
            self.stack[-1].state = state

    def _binpersid(self, _: Any) -> None:
        self._persid(self.stack.pop())

    def _persid(self, identifier: Any) -> None:
        storage = _storage(identifier)
        self.stack.append(storage)
        if self.storages is not None and isinstance(storage, StorageId):
            self.storages[storage.key] = storage

    def _ext1(self, _: Any) -> None:
        self.stack.append(StandIn("an extension of pickle"))

    _ext2 = _ext4 = _next_buffer = _ext1

    def _readonly_buffer(self, _: Any) -> None:
        pass


def _checked(name: Global) -> Global:
    """Raises where no file of weights has a use for it; a dotted name may reach a module through another one."""
    full = f"{name}."
    if _HOSTILE_MODULES.search(full) or _HOSTILE_BUILTINS.match(full):
        raise HostileFile(re.sub(r"^(?:__builtin__|builtins)\.", "", str(name)))
    return name


def _called(function: Any, arguments: Any) -> Any:
    if isinstance(function, StandIn) and _MAKES_FUNCTIONS.match(function.name):
        raise HostileFile(re.sub(r"^\w+\.", "", function.name))
    if not isinstance(function, Global):
        return StandIn("an object")
    make = _MAKERS.get(function)
    if make is None or not isinstance(arguments, tuple):
        return StandIn(str(function))
    try:
        return make(*arguments)
    except TypeError:  # other arguments than the function has
        return StandIn(str(function))


def _storage(identifier: Any) -> StorageId | StandIn:
    """PyTorch's only kind: ("storage", type, key, device, elements), and in old files a view of a larger one."""
    if isinstance(identifier, tuple) and len(identifier) in (5, 6):
        what, kind, key, _, size, *view = identifier
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if (
            what in ("storage", b"storage")
            and dtype is not None
            and isinstance(key, (str, int))
            and view in ([], [None])
        ):
            return StorageId(str(key), dtype, size if isinstance(size, int) else -1)
    return StandIn("a storage of another kind")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    if not isinstance(storage, StorageId):
        return StandIn("torch.Tensor")
    return _view(storage, offset, shape, stride, storage.dtype)


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any) -> Any:
    kind = getattr(torch, dtype.name, None) if isinstance(dtype, Global) and dtype.module == "torch" else None
    if not isinstance(storage, StorageId) or not isinstance(kind, torch.dtype):
        return StandIn("torch.Tensor")
    return _view(storage, offset, shape, stride, kind)


def _view(storage: StorageId, offset: Any, shape: Any, stride: Any, dtype: torch.dtype) -> TensorView:
    sizes = [
        one if isinstance(one, tuple) and len(one) <= MAX_AXES and all(map(_is_size, one)) else None
        for one in (shape, stride)
    ]
    return TensorView(storage, offset if _is_size(offset) else None, *sizes, dtype)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_STEP


_MAKERS: dict[Global, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): lambda *_: {},
    Global("collections", "defaultdict"): lambda *_: {},
    Global("collections", "Counter"): lambda *_: {},
    Global("torch", "Size"): lambda shape: shape,
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    Global("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    Global("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, arguments, *_: _called(
        function, arguments
    ),
}
