"""Transfer of foreign weights into our networks, strict in names, shapes and values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from .._files import CheckpointError, listed
from .._weights import check_own_values, fill, is_finite, weight_problems


@dataclass(frozen=True)
class Source:
    """The origin of one of our tensors.

    Args:
        keys: names of the foreign tensors.
        make: computes our tensor from them.
    """

    keys: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


def rename(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, Source]:
    """Return the sources of modules that differ in name only, each with a weight and a bias.

    Args:
        ours: prefix of our names.
        theirs: prefix of the foreign names.
        names: foreign module names by our module names.
    """
    return {
        f"{ours}{mine}.{part}": Source((f"{theirs}{other}.{part}",))
        for mine, other in names.items()
        for part in ("weight", "bias")
    }


def attention(ours: str, theirs: str, heads: int, order: str, **names: str) -> dict[str, Source]:
    """Return the sources of an attention with one projection to queries, keys and values.

    Args:
        ours: our name of the module.
        theirs: the foreign name.
        heads: number of heads.
        order: order of the projection's outputs; see `by_kind`.
        **names: foreign names of ``norm``, ``qkv`` and ``out``, within `theirs`.
    """
    sources = rename(f"{ours}.", f"{theirs}.", names)
    for name, make in (("qkv", partial(by_kind, heads=heads, order=order)), ("out", matrix)):
        for part in ("weight", "bias"):
            sources[f"{ours}.{name}.{part}"] = Source((f"{theirs}.{names[name]}.{part}",), make)
    return sources


def by_kind(weight: Tensor, heads: int, order: str) -> Tensor:
    """Reorder the outputs of a projection to queries, keys and values: kind, head, channel.

    Args:
        weight: weight (3 C, C, 1, ...) or bias (3 C,).
        heads: number of heads.
        order: order of the outputs in the file, such as "head kind channel".

    Returns:
        Weight (3 C, C) or bias (3 C,).
    """
    pattern = f"({order}) ... -> (kind head channel) ..."
    return rearrange(matrix(weight), pattern, kind=3, head=heads)


def matrix(weight: Tensor) -> Tensor:
    """Return the matrix (out, in) of a convolution (out, in, 1, ...) with a kernel of size 1."""
    return weight.reshape(weight.shape[:2])


def sines_first(weight: Tensor) -> Tensor:
    """Swap the halves of a linear layer's inputs, for features with the cosines first."""
    return weight.roll(-(weight.shape[1] // 2), dims=1)


def transfer(
    path: str | os.PathLike[str],
    network: nn.Module,
    sources: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
) -> None:
    """Load foreign tensors into a network, after checking all of them.

    Args:
        path: the file, for error messages.
        network: the network, perhaps without values, see `laid_out`.
        sources: the source of each tensor of its state dict.
        tensors: the foreign tensors.

    Raises:
        CheckpointError: if tensors are missing, extra, misshapen or no weights; it lists them.
    """
    check_own_values(path, tensors)
    faults = weight_problems(tensors)
    problems: list[str] = []
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    wanted: dict[str, Tensor] = network.state_dict()
    for name, value in wanted.items():
        source = sources.get(name)
        if source is None:
            problems.append(f"missing a source of {name}")
            continue
        used.update(source.keys)
        if absent := [key for key in source.keys if key not in tensors]:
            problems += [f"missing {key}" for key in absent]
            continue
        if faulty := [f"{key}: {faults[key]}" for key in source.keys if key in faults]:
            problems += faulty
            continue
        given = [tensors[key] for key in source.keys]
        keys = ", ".join(source.keys)
        try:
            made = source.make(*given)
        except (RuntimeError, IndexError, ValueError):
            made = None
        if made is None or made.shape != value.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            problems.append(f"{keys}: expected tensors for {tuple(value.shape)}, got {shapes}")
            continue
        state[name] = torch.empty(made.shape, dtype=value.dtype).copy_(made)
        if made.dtype != value.dtype and not is_finite(state[name]):
            problems.append(f"{keys}: expected numbers within the range of {value.dtype}")
    problems += [f"unexpected {key:.200}" for key in tensors if key not in used]
    if problems:
        raise CheckpointError(f"{path}: the file does not fit the network, {listed(problems)}")
    fill(network, state)
