"""A restricted unpickler for plain data.

`pickle.Unpickler` calls any function that a file names, sets attributes of the results, hashes
any object and allocates memory by sizes in the file. This one builds dictionaries, lists, tuples
and plain values, looks every global up in a fixed table and raises on everything else. Its memory
is bounded by the length of the pickle. Its errors show values by `reprlib`, which terminates even
for a value that contains itself.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from reprlib import repr
from types import NoneType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

_MAX_DEPTH, _MAX_NAME = 100, 200
# Bytes of memory that a pickle may take: so many, and so many more for each of its own.
_FREE, _FACTOR = 1 << 27, 32
# Bytes that the tensors of a file may have in all if each is copied, for each byte of the file.
_REPEATS = 16
_SIZED = (str, bytes, list, tuple, set, dict)
_NUMBERS = {"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}
# The states of numpy's little-endian dtypes.
_NATIVE = [(3, order, None, None, None, -1, -1, 0) for order in "<|"]


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
    machine = _Machine(source, table, persistent)
    try:
        value, steps = machine.load()
    except (IndexError, struct.error) as error:
        raise UnpicklingError("expected a whole pickle, got a damaged one") from error
    _check(value, 4 * steps + 1000, _REPEATS * limit + (1 << 20))
    return value


class _Machine:
    """The stack and the memory of the machine that a pickle is a program for."""

    def __init__(
        self,
        source: BinaryIO,
        table: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self._source, self._table, self._persistent = source, table, persistent
        self._start = source.tell()
        self._end = source.seek(0, os.SEEK_END)
        source.seek(self._start)
        self._passed = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> tuple[Any, int]:
        """Return the value and the number of operations."""
        read, operations = self._source.read, _OPERATIONS
        steps, spent, allowed = 0, 0, _FREE
        while (code := read(1)) != pickle.STOP:
            operation, cost = operations.get(code) or _unknown(code)
            steps += 1
            spent += cost
            if spent > allowed:
                allowed = _FREE + _FACTOR * (self._source.tell() - self._start)
                if spent > allowed:
                    raise UnpicklingError("expected a pickle of few parts, got too many")
            operation(self)
        if self.marked or len(self.stack) != 1:
            raise UnpicklingError("expected a pickle of one value, got an unfinished one")
        return self.stack[0], steps + 1

    def take(self, count: int) -> bytes:
        """Read bytes, without allocating more than the file has left."""
        if count > 1 << 16 and count > self._end - self._source.tell():
            raise UnpicklingError(f"expected {count} more bytes, got the end of the file")
        data = self._source.read(count)
        if len(data) < count:
            raise UnpicklingError(f"expected {count} more bytes, got the end of the file")
        return data

    def pop(self, count: int) -> list[Any]:
        """Take values off the stack."""
        if len(self.stack) < count:
            raise UnpicklingError("expected a value on the stack, got none")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_marked(self) -> list[Any]:
        """Take the values since the last mark off the stack."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        """Start a part of the stack."""
        self.marked.append(self.stack)
        self.stack = []

    def put(self, number: int) -> None:
        """Store the last value."""
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        """Push a stored value."""
        if number not in self.memo:
            raise UnpicklingError(f"expected a stored value, got number {number}")
        self.stack.append(self.memo[number])

    def find_line(self) -> None:
        """Push the global of which module and name follow, a line each."""
        lines = [self._source.readline(_MAX_NAME + 2) for _ in range(2)]
        if not all(line.endswith(b"\n") for line in lines):
            raise UnpicklingError("expected the name of a global, got a longer text")
        self._find(*(line[:-1].decode() for line in lines))

    def find_stacked(self) -> None:
        """Push the global of which module and name are on the stack."""
        module, name = self.pop(2)
        if type(module) is not str or type(name) is not str:
            raise UnpicklingError(f"expected the name of a global, got {repr(module)}")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        if max(len(module), len(name)) > _MAX_NAME:
            raise UnpicklingError("expected the name of a global, got a longer text")
        full = f"{module}.{name}"
        try:
            self.stack.append(self._table[full])
        except KeyError:
            raise UnpicklingError(f"the global {full}, which is not among the safe ones") from None

    def call(self) -> None:
        """Replace a function and its arguments by the result."""
        callee, args = self.pop(2)
        if not isinstance(callee, Call) or type(args) is not tuple:
            raise UnpicklingError(f"expected a call of an allowed global, got {repr(callee)}")
        self._passed += sum(len(part) for part in args if isinstance(part, _SIZED))
        if self._passed > 1000 + self._source.tell() - self._start:
            raise UnpicklingError("expected each part to be used once, got more than was read")
        self.stack.append(callee.function(*args))

    def identify(self) -> None:
        """Replace a persistent id by its value."""
        if self._persistent is None:
            raise UnpicklingError("expected a pickle of plain data, got a persistent id")
        self.stack.append(self._persistent(self.stack.pop()))

    def build(self) -> None:
        """Set the state of an object."""
        target, state = self.pop(2)
        self.stack.append(target)
        if isinstance(target, Node) and target.state is None:
            target.state = state
        elif (
            type(target) is OrderedDict
            and type(state) is dict
            and len(state) == 1
            and "_metadata" in state
        ):
            target.__dict__.update(state)  # the versions of a state dict's modules
        elif isinstance(target, np.dtype):
            if type(state) is not tuple or state not in _NATIVE:
                raise UnpicklingError(f"expected a plain little-endian dtype, got {repr(state)}")
        else:
            raise UnpicklingError(f"expected plain data, got a state for {type(target).__name__}")


def _unknown(code: bytes) -> Any:
    if not code:
        raise UnpicklingError("expected a whole pickle, got the end of the file")
    known = pickletools.code2op.get(code.decode("latin1"))
    name = known.name if known else code.hex()
    raise UnpicklingError(f"expected a pickle of plain data, got the operation {name}")


def _extend(target: Any, items: list[Any]) -> None:
    _check_target(target, list)
    target.extend(items)


def _add(target: Any, items: list[Any]) -> None:
    _check_target(target, set)
    target.update(map(_key, items))


def _set_items(target: Any, items: list[Any]) -> None:
    _check_target(target, dict, OrderedDict)
    if len(items) % 2:
        raise UnpicklingError("expected pairs of keys and values, got an odd number")
    target.update(zip(map(_key, items[::2]), items[1::2], strict=True))


def _check_target(target: Any, *kinds: type) -> None:
    if type(target) not in kinds:
        raise UnpicklingError(f"expected a list, set or dictionary, got {type(target).__name__}")


def _key(key: Any) -> Any:
    # Hashing nested tuples overflows the C stack; long integers can be made to collide.
    small = isinstance(key, int) and abs(key) < 2**63
    if key is None or small or (isinstance(key, (str, bytes, float)) and key == key):
        return key
    raise UnpicklingError(f"expected a string or a number as key, got {type(key).__name__}")


def _constant(value: Any) -> _Operation:
    return lambda machine: machine.stack.append(value)


def _made(make: Callable[[], Any]) -> _Operation:
    return lambda machine: machine.stack.append(make())


def _number(form: str, use: Callable[[_Machine, Any], None]) -> _Operation:
    """Read a number and use it."""
    packed = struct.Struct(form)
    size, unpack = packed.size, packed.unpack
    return lambda machine: use(machine, unpack(machine.take(size))[0])


def _pushed(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _ignored(machine: _Machine, value: Any) -> None:
    pass


def _content(form: str, convert: Callable[[bytes], Any]) -> _Operation:
    """Read a size and so many bytes, and push what they mean."""

    def push(machine: _Machine, count: int) -> None:
        machine.stack.append(convert(machine.take(count)))

    return _number(form, push)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _long(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _tuple(count: int) -> _Operation:
    return lambda machine: machine.stack.append((*machine.pop(count),))


def _marked_tuple(machine: _Machine) -> None:
    items = tuple(machine.pop_marked())
    machine.stack.append(items)


def _marked(use: Callable[[Any, list[Any]], None]) -> _Operation:
    """Use the values since the last mark on the one before it."""

    def operation(machine: _Machine) -> None:
        items = machine.pop_marked()
        use(machine.stack[-1], items)

    return operation


def _last(count: int, use: Callable[[Any, list[Any]], None]) -> _Operation:
    """Use the last values of the stack on the one before them."""

    def operation(machine: _Machine) -> None:
        items = machine.pop(count)
        use(machine.stack[-1], items)

    return operation


_Operation: TypeAlias = Callable[[_Machine], None]
# Each operation with the memory that it may take, beyond a few times its own bytes.
_OPERATIONS: dict[bytes, tuple[_Operation, int]] = {
    pickle.PROTO: (_number("<B", _ignored), 0),
    pickle.FRAME: (_number("<Q", _ignored), 0),
    pickle.NONE: (_constant(None), 8),
    pickle.NEWTRUE: (_constant(True), 8),
    pickle.NEWFALSE: (_constant(False), 8),
    pickle.BININT: (_number("<i", _pushed), 40),
    pickle.BININT1: (_number("<B", _pushed), 8),
    pickle.BININT2: (_number("<H", _pushed), 40),
    pickle.LONG1: (_content("<B", _long), 64),
    pickle.BINFLOAT: (_number(">d", _pushed), 40),
    pickle.SHORT_BINUNICODE: (_content("<B", _text), 88),
    pickle.BINUNICODE: (_content("<I", _text), 88),
    pickle.BINUNICODE8: (_content("<Q", _text), 88),
    pickle.SHORT_BINBYTES: (_content("<B", bytes), 48),
    pickle.BINBYTES: (_content("<I", bytes), 48),
    pickle.BINBYTES8: (_content("<Q", bytes), 48),
    pickle.EMPTY_TUPLE: (_constant(()), 8),
    pickle.EMPTY_LIST: (_made(list), 96),
    pickle.EMPTY_DICT: (_made(dict), 256),
    pickle.EMPTY_SET: (_made(set), 256),
    pickle.MARK: (_Machine.mark, 80),
    pickle.TUPLE: (_marked_tuple, 64),
    pickle.TUPLE1: (_tuple(1), 72),
    pickle.TUPLE2: (_tuple(2), 80),
    pickle.TUPLE3: (_tuple(3), 88),
    pickle.APPEND: (_last(1, _extend), 16),
    pickle.APPENDS: (_marked(_extend), 0),
    pickle.ADDITEMS: (_marked(_add), 0),
    pickle.SETITEM: (_last(2, _set_items), 64),
    pickle.SETITEMS: (_marked(_set_items), 0),
    pickle.BINPUT: (_number("<B", _Machine.put), 0),
    pickle.LONG_BINPUT: (_number("<I", _Machine.put), 128),
    pickle.MEMOIZE: (lambda machine: machine.put(len(machine.memo)), 128),
    pickle.BINGET: (_number("<B", _Machine.get), 8),
    pickle.LONG_BINGET: (_number("<I", _Machine.get), 8),
    pickle.GLOBAL: (_Machine.find_line, 512),
    pickle.STACK_GLOBAL: (_Machine.find_stacked, 512),
    pickle.REDUCE: (_Machine.call, 1024),
    pickle.NEWOBJ: (_Machine.call, 1024),
    pickle.BUILD: (_Machine.build, 0),
    pickle.BINPERSID: (_Machine.identify, 1024),
}


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


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise UnpicklingError("expected a numpy number, got something else")
    (value,) = np.frombuffer(data, dtype)
    return value


def _dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    if type(code) is not str or code not in _NUMBERS or {type(align), type(copy)} - {bool, int}:
        raise UnpicklingError(f"expected the dtype of a number, got {repr(code)}")
    return np.dtype(f"<{code}")


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise UnpicklingError(f"expected bytes as latin1, got encoding {repr(encoding)}")
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise UnpicklingError(f"expected the items of a set, got {type(items).__name__}")
    return set(map(_key, items))


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise UnpicklingError("expected the two parts of a complex number, got something else")
    return complex(real, imaginary)


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise UnpicklingError(f"expected the name of a device, got {repr(kind)}")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _size(items: Any) -> torch.Size:
    if type(items) is not tuple or any(type(n) is not int for n in items):
        raise UnpicklingError(f"expected a shape, got {repr(items)}")
    return torch.Size(items)


def _counter(counts: Any) -> Counter[Any]:
    if type(counts) is not dict or any(type(n) is not int for n in counts.values()):
        raise UnpicklingError(f"expected numbers by key, got {repr(counts)}")
    return Counter(counts)


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
