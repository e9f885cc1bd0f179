"""Loops that run in several processes: what torch.distributed leaves to them."""

from __future__ import annotations

__all__: list[str] = []
