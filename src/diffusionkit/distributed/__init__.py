"""Loops that run in several processes: what torch.distributed leaves to them."""

from __future__ import annotations

from .gathered import gathered_weights

__all__ = ["gathered_weights"]
