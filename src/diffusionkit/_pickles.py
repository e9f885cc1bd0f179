"""A restricted unpickler for plain data.

`pickle.Unpickler` calls any function that a file names, sets attributes of the results, hashes
any object and allocates memory by sizes in the file. This one builds dictionaries, lists, tuples
and plain values, looks every global up in a fixed table and raises on everything else. Its memory
is bounded by the length of the pickle. Its errors show values by `reprlib`, which terminates even
for a value that contains itself.
"""

from __future__ import annotations

import os
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from reprlib import repr
from types import NoneType
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

_MAX_DEPTH, _MAX_NAME = 100, 200
# Bytes of memory that a pickle may take: so many, and so many more for each of its own.
_FREE, _FACTOR = 1 << 25, 32
# Bytes that the tensors of a file may have in all, each by itself, for each byte of the file.
_REPEATS = 16
_SIZED = (str, bytes, list, tuple, set, dict)
_LITTLE = [(3, order, None, None, None, -1, -1, 0) for order in "<|"]
# Each operation, the format of its argument and the memory it takes beyond its own bytes.
_OPERATIONS = {
    "PROTO": ("<B", 0), "FRAME": ("<Q", 0), "STOP": ("", 0), "MARK": ("", 80),
    "NONE": ("", 8), "NEWTRUE": ("", 8), "NEWFALSE": ("", 8), "BININT1": ("<B", 8),
    "BININT2": ("<H", 40), "BININT": ("<i", 40), "BINFLOAT": (">d", 40), "LONG1": ("<B", 64),
    "SHORT_BINUNICODE": ("<B", 96), "BINUNICODE": ("<I", 96), "BINUNICODE8": ("<Q", 96),
    "SHORT_BINBYTES": ("<B", 48), "BINBYTES": ("<I", 48), "BINBYTES8": ("<Q", 48),
    "EMPTY_LIST": ("", 96), "EMPTY_DICT": ("", 256), "EMPTY_SET": ("", 256),
    "APPEND": ("", 16), "APPENDS": ("", 0), "SETITEM": ("", 64), "SETITEMS": ("", 0),
    "ADDITEMS": ("", 0), "EMPTY_TUPLE": ("", 8), "TUPLE": ("", 64), "TUPLE1": ("", 96),
    "TUPLE2": ("", 96), "TUPLE3": ("", 96), "BINPUT": ("<B", 0), "LONG_BINPUT": ("<I", 128),
    "MEMOIZE": ("", 128), "BINGET": ("<B", 8), "LONG_BINGET": ("<I", 8), "GLOBAL": ("", 256),
    "STACK_GLOBAL": ("", 256), "REDUCE": ("", 512), "NEWOBJ": ("", 512), "BUILD": ("", 0),
    "BINPERSID": ("", 512),
}  # fmt: skip
_CONTENTS: dict[str, Callable[[bytes], Any]] = {
    "LONG1": lambda data: int.from_bytes(data, "little", signed=True),
    **dict.fromkeys(
        ["SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"],
        lambda data: data.decode("utf-8", "surrogatepass"),
    ),
    **dict.fromkeys(["SHORT_BINBYTES", "BINBYTES", "BINBYTES8"], bytes),
}
_PUSHED = {"BININT", "BININT1", "BININT2", "BINFLOAT", *_CONTENTS}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_CODES = {
    opcode.code.encode("latin1"): (
        opcode.name,
        struct.Struct(_OPERATIONS[opcode.name][0]),
        _CONTENTS.get(opcode.name),
        _OPERATIONS[opcode.name][1],
    )
    for opcode in pickletools.opcodes
    if opcode.name in _OPERATIONS
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global:
    """A global that is not itself plain data, but makes some."""


@dataclass(frozen=True)
class Call(Global):
    """A function of ours that a pickle may call by the name of a global.

    Args:
        function: checks its arguments, which come from the file.
    """

    function: Callable[..., Any]


@dataclass(repr=False, slots=True)
class Node:
    """A placeholder for an object whose class is not imported.

    Args:
        name: the global that was called.
        state: the state of the object, as set by the pickle.
    """

    name: str
    state: Any = None


def run(
    source: BinaryIO,
    table: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    *,
    limit: int = 0,
) -> Any:
    """Return the value of the pickle at the current position of a file.

    The value is a tree of at most 100 levels. A pickle may refer to one part many times; still,
    neither the value nor the arguments of all calls are much larger than the pickle is long, and
    copies of all its tensors would not be much larger than the file.

    Args:
        source: a file open for reading; it is left after the end of the pickle.
        table: the values of the globals by their full names, a `Call` for a function.
        persistent: returns the value of a persistent id.
        limit: the length of the file that holds the tensors.

    Raises:
        Exception: of many types, if the pickle is damaged or uses anything not allowed.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    start, steps, passed = source.tell(), 0, 0
    for name, argument in _operations(source):
        steps += 1
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise UnpicklingError(f"expected a stored value, got number {argument}")
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            (value,) = _popped(stack, 1)
            memo[len(memo) if argument is None else argument] = value
            stack.append(value)
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"):
            if not marked:
                raise UnpicklingError("expected a mark on the stack, got none")
            items, stack = stack, marked.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                _extend(name, stack, items)
        elif name in _TUPLES:
            stack.append(tuple(_popped(stack, _TUPLES[name])))
        elif name == "APPEND":
            _extend("APPENDS", stack, _popped(stack, 1))
        elif name == "SETITEM":
            _extend("SETITEMS", stack, _popped(stack, 2))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_found(table, argument or _popped(stack, 2)))
        elif name in ("REDUCE", "NEWOBJ"):
            callee, args = _popped(stack, 2)
            if not isinstance(callee, Call) or type(args) is not tuple:
                raise UnpicklingError(f"expected a call of an allowed global, got {repr(callee)}")
            passed += sum(len(part) for part in args if isinstance(part, _SIZED))
            if passed > 1000 + source.tell() - start:
                raise UnpicklingError("expected each part to be used once, got more than was read")
            stack.append(callee.function(*args))
        elif name == "BUILD":
            target, state = _popped(stack, 2)
            _build(target, state)
            stack.append(target)
        elif name == "BINPERSID":
            if persistent is None:
                raise UnpicklingError("expected plain data, got a persistent id")
            stack.append(persistent(*_popped(stack, 1)))
    if marked or len(stack) != 1:
        raise UnpicklingError("expected a pickle of one value, got an unfinished one")
    _check(stack[0], 4 * steps + 1000, _REPEATS * limit + (1 << 20))
    return stack[0]


def _operations(source: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the operations of a pickle, without reading more than the file holds."""
    start = source.tell()
    end = source.seek(0, os.SEEK_END)
    source.seek(start)

    def read(count: int) -> bytes:
        data = source.read(count if count <= 1 << 16 else min(count, end - source.tell()))
        if len(data) < count:
            raise UnpicklingError(f"expected {count} more bytes, got the end of the file")
        return data

    name, spent, allowed = "", 0, _FREE
    while name != "STOP":
        code = source.read(1)
        name, packed, content, cost = _CODES.get(code) or _unknown(code)
        spent += cost
        if spent > allowed:
            allowed = _FREE + _FACTOR * (source.tell() - start)
            if spent > allowed:
                raise UnpicklingError("expected a pickle of fewer parts, got too many")
        argument: Any = None
        if packed.size:
            (argument,) = packed.unpack(read(packed.size))
            if content is not None:
                argument = content(read(argument))
        elif name == "GLOBAL":
            argument = [source.readline(_MAX_NAME + 2).decode().rstrip("\n") for _ in range(2)]
        yield name, argument


def _unknown(code: bytes) -> Any:
    names = [op.name for op in pickletools.opcodes if op.code.encode("latin1") == code]
    found = f"the operation {(*names, code)[0]}" if code else "the end of the file"
    raise UnpicklingError(f"expected a pickle of plain data, got {found}")


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise UnpicklingError("expected a value on the stack, got none")
    items = stack[-count:]
    del stack[-count:]
    return items


def _found(table: Mapping[str, Any], names: list[Any]) -> Any:
    if any(type(name) is not str or len(name) > _MAX_NAME for name in names):
        raise UnpicklingError(f"expected the name of a global, got {repr(names)}")
    name = ".".join(names)
    try:
        return table[name]
    except KeyError:
        raise UnpicklingError(f"the global {name}, which is not among the safe ones") from None


def _extend(operation: str, stack: list[Any], items: list[Any]) -> None:
    target: Any = stack[-1] if stack else None
    if operation == "APPENDS" and type(target) is list:
        target.extend(items)
    elif operation == "ADDITEMS" and type(target) is set:
        target.update(map(check_key, items))
    elif operation == "SETITEMS" and type(target) in (dict, OrderedDict):
        if len(items) % 2:
            raise UnpicklingError("expected pairs of keys and values, got an odd number")
        target.update(zip(map(check_key, items[::2]), items[1::2], strict=True))
    else:
        raise UnpicklingError(f"expected a list, set or dictionary, got {type(target).__name__}")


def check_key(key: Any) -> Any:
    """Return a key of a dictionary or an item of a set, if it may be one."""
    # Hashing nested tuples overflows the C stack; long integers can be made to collide.
    small = isinstance(key, int) and abs(key) < 2**63
    if key is None or small or (isinstance(key, (str, bytes, float)) and key == key):
        return key
    raise UnpicklingError(f"expected a string or a number as key, got {type(key).__name__}")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Node) and target.state is None:
        target.state = state
    elif isinstance(target, np.dtype):
        if type(state) is not tuple or state not in _LITTLE:
            raise UnpicklingError(f"expected a plain little-endian dtype, got {repr(state)}")
    elif type(target) is OrderedDict and type(state) is dict and state.keys() == {"_metadata"}:
        target.__dict__.update(state)  # the versions of a state dict's modules
    else:
        raise UnpicklingError(f"expected plain data, got a state for {type(target).__name__}")


def _check(value: Any, budget: int, tensors: int) -> None:
    """Check that a value is a tree of plain data of a bounded size.

    Args:
        value: the value.
        budget: the number of parts that it may have.
        tensors: the number of bytes that its tensors may have.
    """
    branches: list[Iterator[Any]] = [iter((value,))]
    while branches:
        for item in branches[-1]:
            budget -= 1
            if isinstance(item, Tensor):
                tensors -= item.numel() * item.itemsize
            elif isinstance(item, Global):
                raise UnpicklingError("expected plain data, got a function or a type")
            elif isinstance(item, (dict, list, tuple, Node)):
                branches.append(_parts(item))
                break
        else:
            branches.pop()
        if budget < 0 or len(branches) > _MAX_DEPTH:
            raise UnpicklingError(
                "expected a tree of values, got one that contains itself or repeats too often"
            )
        if tensors < 0:
            raise UnpicklingError("expected tensors of the size of the file, got far larger ones")


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, Node):
        yield item.state
    elif isinstance(item, dict):
        yield from item.values()
        if hasattr(item, "_metadata"):
            yield from _versions(item._metadata)
    else:
        yield from item


def _versions(metadata: Any) -> Iterator[Any]:
    entries = metadata.values() if isinstance(metadata, dict) else [metadata]
    for entry in entries:
        yield None
        for number in entry.values() if isinstance(entry, dict) else [entry]:
            if not isinstance(entry, dict) or type(number) not in (int, NoneType):
                raise UnpicklingError("expected the versions of modules, got something else")
            yield None
