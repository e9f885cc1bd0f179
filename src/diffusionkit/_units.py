"""Outputs of models whose squared errors some weighting gives weight 1.

`SimpleWeighting` does so to the noise, `EDMWeighting` to the output of `EDMModel`. Such weights are
neither computed nor multiplied by, and need no limit at alpha = 0. The weighting and the prediction
name the output in an attribute `_unit`.
"""

from __future__ import annotations


def keep_unit(cls: type, method: str) -> None:
    """Set `_unit` of a class to None unless it belongs to the class's own or inherited method.

    Args:
        cls: a class, which may override the method alone.
        method: the method that `_unit` describes.
    """
    for base in cls.__mro__:
        if "_unit" in vars(base):
            return
        if method in vars(base):
            cls._unit = None  # type: ignore[attr-defined]
            return
