"""Fixed frequencies of embeddings, which keep their precision."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from ._arguments import check_label_values


def as_float(noise_label: Tensor, *, log: bool = False) -> Tensor:
    """Return noise labels in float32 at least, or raise unless they can be embedded."""
    use = "embeds their logarithm" if log else "embeds them"
    check_label_values(noise_label, use, positive=log)
    # Labels reach 1e3, beyond the precision of half-precision angles.
    return noise_label.to(torch.promote_types(noise_label.dtype, torch.float32))


class ExactFrequencies(nn.Module, abc.ABC):
    """A table of random numbers that are not trained.

    They are a parameter without a gradient: they are saved, loaded and averaged with the network,
    but not trained. They stay in float32 when the network is converted to half precision.

    Args:
        shape: the shape of the table.
    """

    _exact: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_load_state_dict_post_hook(_keep_exact)  # type: ignore[no-untyped-call]

    @abc.abstractmethod
    def _draw(self) -> None:
        """Fill the table in place."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new frequencies."""
        self._draw()
        _keep_exact(self)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # In half precision the angles would be wrong by whole radians.
        exact = self.frequencies.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frequencies.dtype.itemsize < exact.dtype.itemsize < 8:
            self.frequencies.data = exact.to(self.frequencies.device)
        device, kept = self.frequencies.device, self._exact
        moved = torch.empty_like(kept, device=device) if kept.is_meta else kept.to(device)
        self._exact = moved
        return self

    def exact(self, dtype: torch.dtype) -> Tensor:
        """Return the frequencies in a dtype, without the rounding of a wrapper of the network."""
        frequencies = self.frequencies.to(dtype)
        if self.frequencies.dtype.itemsize < 4:  # rounded by what shards the network
            same = self._exact.to(self.frequencies.dtype) == self.frequencies
            frequencies = torch.where(same, self._exact.to(dtype), frequencies)
        return frequencies


@torch.no_grad()
def _keep_exact(embedding: ExactFrequencies, *_: object) -> None:
    """Keep the frequencies of an embedding, all of them if they are sharded."""
    frequencies = embedding.frequencies.detach()
    whole = getattr(frequencies, "full_tensor", frequencies.clone)
    embedding._exact = whole()
