"""Foreign tensors into our networks: every tensor accounted for, or an error that lists them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._files import CheckpointError

_SHOWN = 20


def _only(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where one tensor of ours comes from.

    Args:
        keys: Names of the foreign tensors.
        make: Makes our tensor of them.
    """

    keys: tuple[str, ...]
    make: Callable[..., Tensor] = _only


def rename(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, Source]:
    """Say that modules with a weight and a bias are called otherwise.

    Args:
        ours: Prefix of our names.
        theirs: Prefix of the foreign names.
        names: Our module names to the foreign ones.

    Returns:
        Sources of the weights and biases.
    """
    return {
        f"{ours}{mine}.{part}": Source((f"{theirs}{other}.{part}",))
        for mine, other in names.items()
        for part in ("weight", "bias")
    }


def transfer(
    path: str | os.PathLike[str],
    network: nn.Module,
    sources: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
) -> None:
    """Load foreign tensors into a network, strictly: all are checked before any is copied.

    Args:
        path: File the tensors came from, for messages.
        network: The network.
        sources: Where each tensor of its state comes from.
        tensors: The foreign tensors.

    Raises:
        CheckpointError: If tensors are missing, extra or misshapen; it lists them.
    """
    problems: list[str] = []
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, wanted in network.state_dict().items():
        source = sources.get(name)
        if source is None:
            problems.append(f"missing what {name} could come from")
            continue
        used.update(source.keys)
        if absent := [key for key in source.keys if key not in tensors]:
            problems += [f"missing {key}" for key in absent]
            continue
        given = [tensors[key] for key in source.keys]
        try:
            made = source.make(*given)
        except (RuntimeError, IndexError, ValueError):
            made = None
        if made is None or made.shape != wanted.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            problems.append(
                f"{', '.join(source.keys)}: expected what makes {tuple(wanted.shape)}, got {shapes}"
            )
        elif not made.is_floating_point():
            problems.append(
                f"{', '.join(source.keys)}: expected floating-point numbers, got {made.dtype}"
            )
        elif not made.isfinite().all():
            problems.append(f"{', '.join(source.keys)}: expected finite numbers, got others")
        else:
            state[name] = made
    problems += [f"unexpected {key}" for key in tensors if key not in used]
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")
        raise CheckpointError(
            f"{path}: the file does not fit the network, {len(problems)} problems: {shown}"
        )
    with torch.no_grad():
        network.load_state_dict(state)
