"""Pickles of persistent objects, as EDM, ECT and their kin save networks, read as records.

What such a pickle may ask for stands in `_allowed`, each name with its stand-in of this module:
objects become (class name, state), tensors are rebuilt within the bounds of their storages,
numpy's scalars become numbers, bound methods (of ECT's loss) nothing at all. Memory stays in
proportion to the file: no stand-in copies what it is given, but for storages, once each.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable, Iterator
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.pickles import restricted

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's older format begins
NO_CALLS = (
    "PROTO LONG1 BININT BININT1 BININT2 NONE NEWTRUE NEWFALSE BINUNICODE MARK EMPTY_DICT "
    "EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS BINPUT "
    "BINGET BINPERSID STOP"
).split()
STORAGE_STEPS = 1000  # of a pickle that describes a storage; torch takes some 50
MOST = 100_000  # modules and tensors of one network, counted as often as they are reached
LONGEST = 500  # letters of a name


class _Inert:
    """What a pickle may hold and not change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise UnpicklingError(f"the state of a {type(self).__name__} can't be set")


class Record(_Inert):
    """An object from outside: the name of its class and its attributes."""

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: dict[str, Any]) -> None:
        if not isinstance(name, str) or not isinstance(state, dict):
            raise UnpicklingError("an object without a class name, or without its attributes")
        self.name, self.state = name, state


class _Module(Record):
    """A plain container of torch, made empty and given its attributes."""

    __slots__ = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        Record.__init__(self, "torch.nn", state)


class _Table(dict):
    """A dict by another name, made empty."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if state:
            raise UnpicklingError("a mapping with attributes")


class _Array(_Inert):
    """A tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Storage(_Inert):
    """The numbers behind tensors."""

    __slots__ = ("values",)

    def __init__(self, values: torch.TypedStorage) -> None:
        self.values = values


class _Dtype:
    """numpy's description of a number: its code, and its order of bytes as the state."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("[fiu][1248]|b1", code):
            raise UnpicklingError(f"numbers of type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise UnpicklingError("numbers in no known order of bytes")
        self.order = state[1]


def _scalar(kind: _Dtype, data: bytes) -> float:
    return np.frombuffer(data, np.dtype(kind.order + kind.code), 1)[0].item()


def _tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Array:
    """A view of the storage; torch itself would make a storage that is too small larger."""
    values = storage.values
    numbers = (offset, *size, *stride)
    if not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers) or len(size) != len(stride):
        raise UnpicklingError("a tensor of impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    have = values._untyped_storage.nbytes() // torch.empty(0, dtype=values.dtype).element_size()
    if count and (last >= have or count > have):
        raise UnpicklingError(f"a tensor of shape {size} in a storage of {have} numbers")
    empty = torch.empty(0, dtype=values.dtype)
    return _Array(empty.set_(values._untyped_storage, offset, size, stride))


def _object(meta: dict[str, Any]) -> Record:
    return Record(meta["class_name"], meta["state"])


def _method(of: Record, name: str) -> None:
    """A bound method, which ECT's loss keeps in itself; of anything else it is an attack."""
    if not isinstance(of, Record) or not isinstance(name, str):
        raise UnpicklingError(f"builtins.getattr of a {type(of).__name__}")


def _check_storage(data: bytes) -> None:
    """The bytes are five pickles and numbers, as torch.save writes a storage: no pickle of them
    calls anything, and no name in them is any but a storage's."""
    if not data.startswith(LEGACY):
        raise UnpicklingError("bytes that torch.save did not write, where a storage belongs")
    stream = io.BytesIO(data)
    for _ in range(5):
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > STORAGE_STEPS:
                raise UnpicklingError("a storage described at endless length")
            if opcode.name == "GLOBAL" and re.fullmatch(r"torch \w+Storage", argument):
                continue
            if opcode.name not in NO_CALLS:
                asks = argument.replace(" ", ".") if opcode.name == "GLOBAL" else opcode.name
                raise UnpicklingError(f"the bytes of a storage ask for {asks:.80}")


def _allowed(size: int) -> dict[tuple[str, str], Callable[..., Any]]:
    """The stand-ins for one pickle of `size` bytes."""
    left = size

    def storage(data: bytes) -> _Storage:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise UnpicklingError("the bytes of a storage, more than once")
        _check_storage(data)
        values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(values, torch.TypedStorage):
            raise UnpicklingError(f"a {type(values).__name__} where a storage belongs")
        if values._untyped_storage.nbytes() > len(data):
            raise UnpicklingError("a storage larger than its bytes")
        return _Storage(values)

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _object,
        ("dnnlib.util", "EasyDict"): _Table,
        ("collections", "OrderedDict"): _Table,
        ("builtins", "set"): lambda items=(): items,
        ("builtins", "getattr"): _method,
        ("torch.nn.modules.container", "ModuleDict"): _Module,
        ("torch.nn.modules.container", "ModuleList"): _Module,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
    }


def unpickled(data: bytes, where: str) -> Any:  # noqa: ANN401 - a pickle holds anything
    """The pickle's value, objects as Records. Raises StudyError as `restricted` does."""
    return restricted(data, _allowed(len(data)), where)


def attribute(record: object, *names: str) -> Any:  # noqa: ANN401
    """What a record's attributes hold under these names, one in another. Raises ValueError."""
    if not isinstance(record, Record):
        raise ValueError(f"a {type(record).__name__} where a module belongs")
    held: Any = record.state
    for name in names:
        if not isinstance(held, dict) or name not in held:
            raise ValueError(f"{record.name:.80} without {'.'.join(names)}")
        held = held[name]
    return held


def parameters(network: Record) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module and of those in it, by dotted name. Raises ValueError for
    what is no tree of modules."""
    seen = 0

    def walk(module: Record, prefix: str) -> Iterator[tuple[str, Tensor]]:
        nonlocal seen
        for group in ("_parameters", "_buffers", "_modules"):
            held = attribute(module, group)
            if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
                raise ValueError(f"{module.name:.80} whose {group} are not by name")
            for name, value in held.items():
                seen += 1
                if seen > MOST or len(prefix) + len(name) > LONGEST:
                    raise ValueError(f"over {MOST} modules and tensors, or names of {LONGEST}")
                if isinstance(value, _Array):
                    yield f"{prefix}{name}", value.tensor
                elif isinstance(value, Record):
                    yield from walk(value, f"{prefix}{name}.")

    return walk(network, "")
