"""A restricted unpickler for plain data.

`pickle.Unpickler` calls any function that a file names, sets attributes of the results, hashes
any object and allocates memory by sizes in the file. This one builds dictionaries, lists, tuples
and plain values, looks every global up in a fixed table and raises on everything else. Its errors
show values by `reprlib`, which terminates even for a value that contains itself.
"""

from __future__ import annotations

import math
import os
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from reprlib import repr
from types import NoneType
from typing import Any, BinaryIO, cast

import numpy as np
import torch

_PLAIN = {
    "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1",
    "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE",
    "BINBYTES", "BINBYTES8", "SHORT_BINBYTES",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_SIZED = (str, bytes, list, tuple, set, dict)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAX_DEPTH = 100
_NUMBERS = {"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}

NUMPY_DTYPES = [np.dtype(code) for code in sorted(_NUMBERS)]


@dataclass(frozen=True)
class Call:
    """A function of ours that a pickle may call by the name of a global.

    Args:
        function: checks its arguments, which come from the file.
    """

    function: Callable[..., Any]


@dataclass(repr=False)
class Node:
    """A placeholder for an object whose class is not imported.

    Args:
        name: the global that was called.
        args: the arguments of the call.
        state: the state of the object, as set by the pickle.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


class _Source:
    """A file whose reads never allocate more memory than it has bytes left."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tell, self.readline = file, file.tell, file.readline
        start = file.tell()
        self._length = file.seek(0, os.SEEK_END)
        file.seek(start)

    def read(self, count: int) -> bytes:
        if count > 1 << 16:
            count = min(count, self._length - self.tell())
        return self._file.read(count)


def run(
    source: BinaryIO,
    find: Callable[[str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the value of the pickle at the current position of a file.

    The value is a tree of at most 100 levels. A pickle may refer to one part many times; still,
    neither the value nor the arguments of all calls are much larger than the pickle is long.

    Args:
        source: a file open for reading; it is left after the end of the pickle.
        find: returns the value of a global by its full name, a `Call` for a function.
        persistent: returns the value of a persistent id.

    Raises:
        Exception: of many types, if the pickle is damaged or uses anything not allowed.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    start, steps, passed = source.tell(), 0, 0
    argument: Any
    for opcode, argument, position in pickletools.genops(cast(BinaryIO, _Source(source))):
        steps += 1
        name = opcode.name
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"):
            items, stack = stack, marked.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                _extend(name, stack[-1], items)
        elif name in _TUPLES:
            stack.append(tuple(_popped(stack, _TUPLES[name])))
        elif name == "APPEND":
            _extend("APPENDS", stack[-2], _popped(stack, 1))
        elif name == "SETITEM":
            _extend("SETITEMS", stack[-3], _popped(stack, 2))
        elif name == "GLOBAL":
            stack.append(find(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(find(".".join(_popped(stack, 2))))
        elif name in ("REDUCE", "NEWOBJ"):
            callee, args = _popped(stack, 2)
            if not isinstance(callee, Call) or type(args) is not tuple:
                raise UnpicklingError(f"expected a call of an allowed global, got {repr(callee)}")
            passed += sum(len(part) for part in args if isinstance(part, _SIZED))
            if passed > 1000 + (position or 0) - start:
                raise UnpicklingError("expected each part to be used once, got more than was read")
            stack.append(callee.function(*args))
        elif name == "BUILD":
            _build(stack[-2], stack.pop())
        elif name == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UnpicklingError(f"expected a pickle of plain data, got the operation {name}")
    if marked or len(stack) != 1:
        raise UnpicklingError("expected a pickle of one value, got an unfinished one")
    _check_size(stack[0], 16 * steps)
    return stack[0]


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise UnpicklingError("expected a value on the stack, got none")
    items = stack[-count:]
    del stack[-count:]
    return items


def _extend(operation: str, target: Any, items: list[Any]) -> None:
    if operation == "APPENDS" and type(target) is list:
        target.extend(items)
    elif operation == "ADDITEMS" and type(target) is set:
        target.update(map(_key, items))
    elif operation == "SETITEMS" and type(target) in (dict, OrderedDict):
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
    else:
        raise UnpicklingError(f"expected a list, set or dictionary, got {type(target).__name__}")


def _key(key: Any) -> Any:
    # Hashing nested tuples overflows the C stack; long integers can be made to collide.
    if isinstance(key, int) and abs(key) < 2**63:
        return key
    if key is None or isinstance(key, (str, bytes, float)):
        return key
    raise UnpicklingError(f"expected a string or a number as key, got {type(key).__name__}")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Node) and target.state is None:
        target.state = state
    elif type(target) is OrderedDict and type(state) is dict and {*state} == {"_metadata"}:
        target.__dict__.update(state)  # the versions of a state dict's modules
    else:
        raise UnpicklingError(f"expected plain data, got a state for {type(target).__name__}")


def _check_size(value: Any, budget: int) -> None:
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, dict):
            parts = list(item.values())
            _check_versions(getattr(item, "_metadata", {}))
        elif isinstance(item, (list, tuple)):
            parts = list(item)
        elif isinstance(item, Node):
            parts = [item.args, item.state]
        elif isinstance(item, Call):
            raise UnpicklingError("expected plain data, got a function")
        else:
            continue
        budget -= len(parts)
        if budget < 0 or depth > _MAX_DEPTH:
            raise UnpicklingError(
                "expected a tree of values, got one that contains itself or repeats too often"
            )
        pending += [(part, depth + 1) for part in parts]


def _check_versions(metadata: Any) -> None:
    entries = list(metadata.values()) if isinstance(metadata, dict) else [metadata]
    if not all(isinstance(entry, dict) for entry in entries) or any(
        type(number) not in (int, NoneType) for entry in entries for number in entry.values()
    ):
        raise UnpicklingError("expected the versions of modules, got something else")


def check_view(numel: int, offset: int, size: Any, stride: Any, limit: int) -> None:
    """Check that a tensor lies within its storage.

    Args:
        numel: the elements of the storage.
        offset: the element where the tensor starts.
        size: its shape, from a file.
        stride: its strides, from a file.
        limit: the largest number of elements; with strides of 0 it may exceed `numel`.

    Raises:
        UnpicklingError: if it does not.
    """
    tuples = type(size) is type(stride) is tuple and len(size) == len(stride)
    if not tuples or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UnpicklingError(
            f"expected shape and strides of a tensor, got {repr(size)}, {repr(stride)}"
        )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > limit or (0 not in size and last >= numel):
        raise UnpicklingError(
            f"expected a tensor within its {numel} values, got shape {repr(size)}"
        )


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    if not isinstance(dtype, Node) or dtype.name != "numpy.dtype" or type(data) is not bytes:
        raise UnpicklingError("expected a numpy number, got something else")
    if dtype.state not in [(3, order, None, None, None, -1, -1, 0) for order in "<|"]:
        raise UnpicklingError(f"expected a plain little-endian dtype, got {repr(dtype.state)}")
    (value,) = np.frombuffer(data, f"<{dtype.args[0]}")
    number: bool | int | float = value.item()
    return number


def _dtype(code: Any, align: Any = False, copy: Any = True) -> Node:
    if type(code) is not str or code not in _NUMBERS or {type(align), type(copy)} - {bool, int}:
        raise UnpicklingError(f"expected the dtype of a number, got {repr(code)}")
    return Node("numpy.dtype", (code,))


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise UnpicklingError(f"expected bytes as latin1, got encoding {repr(encoding)}")
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise UnpicklingError(f"expected the items of a set, got {type(items).__name__}")
    return set(map(_key, items))


def _counter(items: Any = None) -> Counter[Any]:
    if type(items) not in (dict, NoneType) or not all(
        type(n) is int for n in (items or {}).values()
    ):
        raise UnpicklingError("expected the numbers of a counter, got something else")
    return Counter(items)


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise UnpicklingError("expected the two parts of a complex number, got something else")
    return complex(real, imaginary)


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise UnpicklingError(f"expected the name of a device, got {repr(kind)}")
    return kind


def _size(items: Any) -> tuple[int, ...]:
    if type(items) is not tuple or any(type(n) is not int for n in items):
        raise UnpicklingError(f"expected a shape, got {repr(items)}")
    return items


PLAIN_GLOBALS: Mapping[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in vars(torch).items() if type(dtype) is torch.dtype},
    "torch.Size": Call(_size),
    "torch.device": Call(_device),
    "collections.OrderedDict": Call(lambda: OrderedDict()),
    "collections.Counter": Call(_counter),
    "_codecs.encode": Call(_encoded),
    "numpy.dtype": Call(_dtype),
    # Names of Python 2 and protocol 2, then of Python 3; of numpy 1, then of numpy 2.
    "__builtin__.set": Call(_set),
    "builtins.set": Call(_set),
    "__builtin__.complex": Call(_complex),
    "builtins.complex": Call(_complex),
    "numpy.core.multiarray.scalar": Call(_scalar),
    "numpy._core.multiarray.scalar": Call(_scalar),
}
"""The globals that are allowed in any file; their values are plain data."""
