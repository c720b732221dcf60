"""Files made to do harm: nothing runs, nothing is imported, no memory is taken; classes do not matter."""

import argparse
import collections
import copyreg
import datetime
import enum
import functools
import io
import json
import operator
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weights_of import assert_same_weights, make_checkpoint, make_model

from ddetr.checkpoint import (
    build_from_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    to_official_state_dict,
)
from ddetr.checkpoint.foreign import _checked
from ddetr.checkpoint.published import parse_checkpoint
from ddetr.errors import InputError
from ddetr.inference.predictor import Predictor
from ddetr.weight_files.files import read_file
from ddetr.weight_files.pickled import StandIn, read_pickle


class Call:
    """Pickles as a call, with whatever `__reduce__` may give beside it."""

    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.reduced

    def __call__(self) -> None:
        """Its pickle is called; pickle asks beforehand whether it can be."""


class Color(enum.Enum):
    """Pickled as getattr(Color, "RED") by some versions of Python."""

    RED = 1


def attacks(harm: Path) -> dict[str, Any]:
    """Each makes the folder `harm` where it is run."""
    command, code = f"mkdir {harm}", f"__import__('os').mkdir({str(harm)!r})"
    inner = io.BytesIO()
    torch.save(Call(os.mkdir, (str(harm),)), inner)
    torch.save(Call(os.mkdir, (str(harm),)), harm.with_name("evil.pt"))
    return {
        "os.system": Call(os.system, (command,)),
        "posix.mkdir": Call(os.mkdir, (str(harm),)),
        "eval": Call(eval, (code,)),
        "exec": Call(exec, (code,)),
        "getattr": Call(Call(getattr, (Call(__import__, ("os",)), "mkdir")), (str(harm),)),
        "partial": Call(functools.partial, (os.mkdir, str(harm))),
        "methodcaller": Call(Call(operator.methodcaller, ("mkdir",)), (harm,)),
        "path": Call(Path.mkdir, (harm,)),
        "load_from_bytes": Call(torch.storage._load_from_bytes, (inner.getvalue(),)),
        "torch.load": Call(torch.load, (str(harm.with_name("evil.pt")), None, None)),
        "hub": Call(torch.hub.load, (str(harm), "x")),
        "build": Call(collections.OrderedDict, (), {"__class__": Call(os.mkdir, (str(harm),))}),
        "items": Call(list, (), None, iter([Call(os.mkdir, (str(harm),))])),
        "map": Call(list, (Call(map, (os.mkdir, [str(harm)])),)),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4"])
def test_nothing_that_a_file_asks_for_is_run(form: str, tmp_path: Path) -> None:
    harm, model = tmp_path / "harm", make_model()
    for name, attack in attacks(harm).items():
        content = {"x": attack, "model": {"w": torch.zeros(2)}}
        options = {"_use_new_zipfile_serialization": form != "legacy"}
        if form == "protocol 4":
            options["pickle_protocol"] = 4
        try:
            torch.save(content, tmp_path / "evil.pth", **options)
        except pickle.PicklingError:  # what this protocol cannot express
            continue
        for read in (load_checkpoint, lambda path: load_weights(model, path)):
            with pytest.raises(InputError, match=r"evil\.pth: ") as caught:
                read(tmp_path / "evil.pth")
            assert "\n" not in str(caught.value)
            assert not harm.exists(), name


def test_what_makes_a_function_and_calls_it_is_named(tmp_path: Path) -> None:
    call = Call(Call(getattr, (Path, "touch")), (tmp_path / "harm",))
    for read in (load_checkpoint, lambda path: load_weights(make_model(), path)):
        torch.save({"model": call}, tmp_path / "evil.pth")
        with pytest.raises(InputError, match=r"the file wants to run 'getattr', which was not done"):
            read(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    "harmful",
    [
        b"cos\nsystem\n(S'mkdir HARM'\ntR.",
        b"(S'mkdir HARM'\nios\nsystem\n.",
        b"(cos\nsystem\nS'mkdir HARM'\no.",
        b"\x80\x02cposix\nmkdir\nX\x04\x00\x00\x00HARM\x85R.",
        b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c\x0amkdir HARM\x85R.",
        b"\x80\x02ctorch.ops\nload_library\nX\x04\x00\x00\x00HARM\x85R.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02\x82\x01X\x01\x00\x00\x001\x85R.",  # an extension code
        b"\x80\x02c__main__\nattack\n)\x81}b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.",  # state for a function
        b"\x80\x02ccollections\nOrderedDict\n}X\x07\x00\x00\x00__new__K\x01sb.",
        b"\x80\x02X\x07\x00\x00\x00strangeQ.",  # a persistent id of another kind
        b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x00aX\x03\x00\x00\x00cpuK\x01tQ.",
        b"Pstrange\n.",
    ],
)
def test_operations_that_call_reach_nothing(harmful: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles by hand, as the record of an archive that torch.save would write."""
    monkeypatch.chdir(tmp_path)
    called: list[int] = []
    monkeypatch.setattr(sys.modules["__main__"], "attack", lambda *_: called.append(1), raising=False)
    copyreg.add_extension("__main__", "attack", 1)
    try:
        with zipfile.ZipFile("evil.pth", "w") as archive:
            archive.writestr("evil/data.pkl", harmful)
            archive.writestr("evil/version", "3")
        defaults = torch._utils._rebuild_tensor_v2.__code__
        for read in (load_checkpoint, lambda path: load_weights(make_model(), path)):
            with pytest.raises(InputError):
                read(Path("evil.pth"))
        assert not called
        assert torch._utils._rebuild_tensor_v2.__code__ is defaults
        assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    finally:
        copyreg.remove_extension("__main__", "attack", 1)


def test_objects_of_other_programs_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training programs save beside the weights; the classes are gone when the file is read."""
    module = types.ModuleType("elsewhere.config")

    class Config(dict):
        pass

    class History:
        def __init__(self) -> None:
            self.values = collections.deque([1.0, 2.0], maxlen=10)

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("this was run")

    for kind in (Config, History):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    config = Config(lr=1.0)
    config.owner = Path("/somewhere")
    source, model = make_model(1), make_model(2)
    beside = {
        "meta": {"config": config, "time": datetime.datetime(2026, 1, 1), "path": Path("runs"), "seed": np.int64(3)},
        "args": argparse.Namespace(lr=1, nheads=4, device=torch.device("cpu")),
        "message_hub": {
            "log": collections.OrderedDict(loss=History()),
            "array": np.zeros((2, 3)),
            "best": np.float64(1),
        },
        "counts": collections.Counter("aab"),
        "groups": collections.defaultdict(list, a=[1]),
        "set": {1, 2},
        "frozen": frozenset([(1, (2, 3))]),
        "kind": Color.RED,
        "precision": torch.float16,
        "level": torch.Size([1]),
        "random": torch.get_rng_state(),
        "slice": slice(1, 2),
        "sparse": torch.zeros(2, 2).to_sparse(),
        "bytes": b"12",
    }
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "elsewhere", types.ModuleType("elsewhere"))
        patched.setitem(sys.modules, "elsewhere.config", module)
        for protocol in (2, 4):
            for is_new in (True, False):
                file = tmp_path / f"{protocol}{is_new}.pth"
                content = {"state_dict": to_official_state_dict(source), **beside}
                torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=is_new)
    for file in sorted(tmp_path.iterdir()):
        report = load_weights(model, file)
        assert report.share == 1
        assert not report.skipped
        assert_same_weights(model, source)
        with pytest.raises(InputError, match="got bare weights: start from them with --weights"):
            load_checkpoint(file)
    assert "elsewhere" not in sys.modules


def test_what_a_pickle_becomes() -> None:
    content = {"a": [1, (2.5, None)], "b": {"x", "y"}, "c": Path("x"), 3: b"\x00", ("k",): 1, "d": True}
    for protocol in range(6):
        value = read_pickle(io.BytesIO(pickle.dumps(content, protocol)))
        assert value["a"] == [1, (2.5, None)]
        assert value["d"] is True
        assert isinstance(value["c"], StandIn)
        assert ("k",) not in value, "only plain keys are hashed"
    assert sorted(value["b"]) == ["x", "y"]
    assert value[3] == b"\x00"


def test_tuples_that_would_be_hashed_for_ever() -> None:
    nested: tuple = ()
    for _ in range(100):
        nested = (nested, nested)
    assert read_pickle(io.BytesIO(pickle.dumps({"a": {}}, 2)[:-1] + pickle.dumps(nested, 2)[2:-1] + b"K\x01s.")) == {
        "a": {}
    }


def test_values_that_would_be_shown_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of the same list twice, a hundred deep, wherever a message or a table could show them; and huge numbers."""
    monkeypatch.setattr("ddetr.checkpoint.published.MAX_VALUES", 10_000)
    nested: Any = []
    for _ in range(100):
        nested = [nested, nested]
    endless: list = []
    endless.append(endless)
    model, huge = make_model(), 10**5000
    weights = to_official_state_dict(make_model(1))
    save_checkpoint(tmp_path / "d.pth", make_checkpoint(model))
    published = torch.load(tmp_path / "d.pth", weights_only=True)
    for value in (nested, endless, huge):
        meta = {"CLASSES": [value] * 3, "dataset_meta": value}
        args = argparse.Namespace(nheads=value)
        torch.save({"model": weights, "meta": meta, "args": args, "epoch": value, huge: {}}, tmp_path / "a.pth")
        assert load_weights(model, tmp_path / "a.pth").share == 1
        torch.save({"model": value, "a": value}, tmp_path / "b.pth")
        with pytest.raises(InputError):
            load_weights(model, tmp_path / "b.pth")
        for name in ("config", "categories", "format_version", "ddetr_version", "metrics"):
            content = {"format": "ddetr", "format_version": 9, name: value, "model": {}}
            torch.save(content, tmp_path / "c.pth")
            with pytest.raises(InputError):
                load_checkpoint(tmp_path / "c.pth")
        torch.save({**published, "config": {**published["config"], "hidden_dim": value}}, tmp_path / "d.pth")
        with pytest.raises(InputError):
            build_from_checkpoint(load_checkpoint(tmp_path / "d.pth"))


def tensor_file(path: Path, shape: tuple, stride: tuple, offset: int = 0) -> Path:
    """A file whose level embedding says what it likes of its four numbers."""
    call = Call(
        torch._utils._rebuild_tensor_v2,
        (
            torch.zeros(4).untyped_storage() if False else Storage(),
            offset,
            shape,
            stride,
            False,
            collections.OrderedDict(),
        ),
    )
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.persistent_id = lambda value: (  # type: ignore[method-assign]
        ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None
    )
    pickler.dump({"transformer.level_embed": call})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bomb/data.pkl", buffer.getvalue())
        archive.writestr("bomb/data/0", b"\x00" * 16)
        archive.writestr("bomb/version", "3")
    return path


class Storage:
    pass


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((2**40,), (0,), 0),
        ((2**20, 2**20), (0, 0), 0),
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (4, 1), 0),
        ((-1,), (1,), 0),
        ((2**70,), (0,), 0),
        ((4.0,), (1,), 0),
        ((2, 2), (1,), 0),
    ],
)
def test_tensors_larger_than_their_file(shape: tuple, stride: tuple, offset: int, tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "bomb.pth", shape, stride, offset)
    model = make_model()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"transformer\.level_embed: .*(more numbers than the 4|is no shape)"):
            load_weights(model, path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_such_a_tensor_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2)
    torch.save({"model": source.state_dict(), "grid": torch.zeros(1).expand(2**40)}, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert_same_weights(model, source)


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({}, 2))
        archive.writestr("bomb/data/0", b"\x00" * 2**20)
    with pytest.raises(InputError, match="its records are compressed"):
        load_weights(make_model(), path)


def safetensors_file(
    path: Path, header: dict[str, Any] | bytes, size: int = 16, header_size: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_size is None else header_size) + text + b"\x00" * size)
    return path


def test_safetensors_headers_that_lie(tmp_path: Path) -> None:
    def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    path, model = tmp_path / "a.safetensors", make_model()
    name = "transformer.level_embed"
    lies = [
        ({name: entry([2**40], 0, 16)}, None),
        ({name: entry([4], 0, 2**42)}, None),
        ({name: entry([4], 0, 16), "b": entry([4], 0, 16)}, None),  # overlap
        ({name: entry([2**62, 4], 0, 16)}, None),
        ({name: entry([4], 0, 16)}, 2**40),
        ({name: entry([4], 0, 16)}, 5),
        ({name: {"dtype": "F32"}}, None),
        ({name: entry([4], 0, 16, "F3")}, None),
        (b"{" * 100, None),
    ]
    for header, header_size in lies:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", header_size or len(text)) + text + b"\x00" * 16)
        for read in (load_checkpoint, lambda path: load_weights(model, path)):
            with pytest.raises(InputError, match=r"a\.safetensors: expected "):
                read(path)


@pytest.mark.parametrize(
    "change", [{"num_queries": 2**40}, {"enc_layers": 10**9}, {"hidden_dim": 2**30}, {"hidden_dim": 8192}]
)
def test_a_published_configuration_that_asks_for_all_memory(change: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.config = {**checkpoint.config, **change}
    with pytest.raises(InputError, match="must be at most|do not fit the configuration beside them"):
        build_from_checkpoint(checkpoint)


@pytest.mark.parametrize("change", [{"hidden_dim": "many"}, {"nheads": None}, {"backbone": ["r18"]}, {"nheads": 0}])
def test_a_published_configuration_of_other_types(change: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.config = {**checkpoint.config, **change}
    with pytest.raises(InputError):
        build_from_checkpoint(checkpoint)


def test_a_published_checkpoint_of_which_any_part_is_missing_or_strange(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_checkpoint(path, make_checkpoint(make_model()))
    whole = read_file(path)
    places = [("model", "transformer.level_embed"), ("categories", 0), ("input", "mean")]
    for place in [*((name,) for name in whole.content), *places]:
        for replacement in ("absent", "text", [1], StandIn("a.Class"), {"category_id": "1", "name": 2}):
            content = {
                key: value.copy() if isinstance(value, (dict, list)) else value for key, value in whole.content.items()
            }
            holder = content[place[0]] if len(place) == 2 else content
            if replacement == "absent":
                del holder[place[-1]]
            else:
                holder[place[-1]] = replacement
            try:
                parse_checkpoint(path, whole._replace(content=content))
            except InputError as error:
                sentence = str(error)
            else:
                sentence = ""
            assert "\n" not in sentence
            assert sentence or not isinstance(replacement, StandIn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 10**6}, "image_size is a whole number of pixels from 1 to"),
        ({"image_size": -5}, "image_size is a whole number of pixels"),
        ({"image_size": "x"}, "image_size is a whole number of pixels"),
        ({"max_size": None}, "max_size is a whole number of pixels"),
        ({"mean": ["a", "b", "c"]}, "mean and std are three numbers each"),
        ({"std": None}, "mean and std are three numbers each"),
    ],
)
def test_what_a_checkpoint_says_of_its_input_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.input.update(change)
    save_checkpoint(tmp_path / "w.pth", checkpoint)
    with pytest.raises(InputError, match=message):
        Predictor.from_checkpoint(tmp_path / "w.pth", "cpu")


@pytest.mark.parametrize("change", [{"position_embedding": "x"}, {"freeze_backbone": "x"}])
def test_a_word_that_is_no_choice_is_said(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected one of .*, got x"):
        make_model(**change)


def test_names_of_tensors_do_nothing_to_a_screen(tmp_path: Path) -> None:
    """They are shown as other names are: other scripts readable, what moves the cursor or hides spelled out."""
    names = ("\u72ac\u202e", "a\x1b[2J", "b" * 5_000)
    torch.save(dict.fromkeys(names, torch.zeros(2)), tmp_path / "names.pth")
    with pytest.raises(InputError) as caught:
        load_weights(make_model(), tmp_path / "names.pth")
    said = str(caught.value).removeprefix(str(tmp_path))
    assert "\u72ac" in said
    assert "u202e" in said
    assert said.isprintable()
    assert len(said) < 1000


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Readers differ in which one they take: in the header of a safetensors file and in its metadata."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, make_checkpoint(make_model()))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + size].rstrip(), content[8 + size :]

    def write(changed: bytes) -> None:
        changed += b" " * (-len(changed) % 8)
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + rest)

    load_checkpoint(path)
    entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    other = json.dumps({entry[0]: {**entry[1], "shape": [1, *entry[1]["shape"]]}}).encode()[1:-1]
    write(header[:-1] + b"," + other + b"}")
    with pytest.raises(InputError, match=r"a\.safetensors"):
        load_checkpoint(path)
    told = json.loads(header)
    told["__metadata__"]["threshold"] = "0.5"
    told["__metadata__"]["metrics"] = '{"AP": 1, "AP": 2}'
    write(json.dumps(told).encode())
    with pytest.raises(InputError, match="its metrics is not whole"):
        load_checkpoint(path)


def test_numbers_beside_weights_are_no_larger_than_those_of_a_network() -> None:
    found = {"nheads": 8, "enc_n_points": 4, "dec_n_points": 65}
    assert _checked(found) == {"nheads": 8, "enc_n_points": 4, "with_box_refine": False, "class_aware": False}
