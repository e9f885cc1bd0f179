"""Whatever torch.save writes of plain values and tensors is read back bit for bit."""

import io
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nested import same
from torch import Tensor, nn

from diffusionkit._files import check_torch, load_torch

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
NUMPY = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d"]


@st.composite
def views(draw: Any) -> list[Tensor]:
    """Views of one storage of random bytes."""
    dtype, count = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 30))
    raw = torch.frombuffer(
        bytearray(draw(st.randoms()).randbytes(count * 16 + 16)), dtype=torch.uint8
    )
    if dtype is torch.bool:
        raw = raw % 2
    base = raw.clone().view(dtype)[:count].clone()
    found = [base, base[count // 3 :: 2], base.view(1, -1, 1).expand(2, -1, 3), base[:0]]
    if count:
        rows = base[: count // 2 * 2].view(2, -1)
        found += [rows.T, rows[1:], base[0], base[-1:].expand(5)]
    if dtype.is_floating_point and dtype.itemsize > 1:
        found += [base.clone().requires_grad_(), nn.Parameter(base), nn.Parameter(base, False)]
    return draw(st.lists(st.sampled_from(found), max_size=6))


keys = st.one_of(
    st.text(max_size=9), st.integers(-(2**62), 2**62), st.booleans(), st.none(),
    st.binary(max_size=5), st.floats(allow_nan=False),
)  # fmt: skip
leaves = st.one_of(
    keys, st.integers(-(2**900), 2**900), st.complex_numbers(allow_nan=False),
    st.sampled_from(NUMPY).flatmap(lambda code: st.integers(0, 1).map(np.dtype(code).type)),
    st.sampled_from(DTYPES), st.lists(st.integers(0, 9)).map(torch.Size), st.text(min_size=300),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 3)]), st.sets(keys),
    st.dictionaries(keys, st.integers(0, 9)).map(Counter), views(),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda part: st.one_of(
        st.lists(part), st.lists(part).map(tuple), st.dictionaries(keys, part),
        st.dictionaries(keys, part).map(OrderedDict),
    ),
    max_leaves=20,
)  # fmt: skip


def written(value: Any, protocol: int, *, legacy: bool) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return (
        [t for part in parts for t in tensors(part)]
        if isinstance(value, (dict, list, tuple))
        else []
    )


def places(value: Any) -> list[int]:
    """The storage of each tensor, numbered in the order of their first use."""
    pointers = [t.untyped_storage().data_ptr() for t in tensors(value) if t.untyped_storage()]
    return [list(dict.fromkeys(pointers)).index(pointer) for pointer in pointers]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(value=values, protocol=st.integers(2, 5), legacy=st.booleans())
def test_values_are_read_back_bit_for_bit(value, protocol, legacy) -> None:
    file = written(value, protocol, legacy=legacy)
    check_torch(file)
    read = load_torch(file)
    assert same(read, value)
    assert places(read) == places(value)
