"""Checks of what users' parts return, made wherever a part is called.

A weight or a schedule value of shape (B, 1) would multiply a batch of losses to (B, B), silently.
The interfaces therefore wrap the methods of their subclasses, but for those of the library, which
are tested: on small data the checks of one loss would take as long as its arithmetic.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

Check = Callable[[object, Any, tuple[Any, ...], dict[str, Any]], None]


def wrap(cls: type, name: str, check: Check) -> None:
    """Replace a method of a class, its own or inherited, by one whose result is checked.

    Args:
        cls: the class.
        name: the name of the method; nothing happens if it is abstract, already checked, or the
            library's own.
        check: takes the object, the result, and the positional and keyword arguments of a call.
    """
    method = inspect.getattr_static(cls, name, None)
    kind = type(method) if isinstance(method, (staticmethod, classmethod)) else None
    function: Any = method.__func__ if isinstance(method, (staticmethod, classmethod)) else method
    if not callable(function) or hasattr(function, "_returned"):
        return
    if hasattr(function, "__isabstractmethod__") or _is_own(function):
        return
    bound = kind is not staticmethod and hasattr(function, "__get__")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        owner, given = (args[0], args[1:]) if bound else (cls.__name__, args)
        check(owner, result, given, kwargs)
        return result

    checked._returned = True  # type: ignore[attr-defined]
    setattr(cls, name, checked if bound and kind is None else (kind or staticmethod)(checked))


def check_each(value: object, n: int, part: object, name: str) -> None:
    """Raise unless a part returned a floating-point tensor (n,), one number for each sample."""
    if isinstance(value, Tensor) and value.shape == (n,):
        if value.dtype.is_floating_point:
            return
        raise TypeError(f"{_title(part)}: expected {name} in floating point, got {value.dtype}")
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    kind = ValueError if isinstance(value, Tensor) else TypeError
    raise kind(f"{_title(part)}: expected {name} as a tensor of shape ({n},), got {got}")


def per_time(*names: str) -> Check:
    """Return the check of a method of a process: one value of each name for each time."""

    def check(self: object, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[-1] if args else next(iter(kwargs.values()))
        values = result if len(names) > 1 else (result,)
        if not isinstance(values, (tuple, list)) or len(values) != len(names):
            many = f" of {len(values)}" if isinstance(values, (tuple, list)) else ""
            raise TypeError(
                f"{_title(self)}: expected a tuple of {' and '.join(names)}, "
                f"got {type(result).__name__}{many}"
            )
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, Tensor) or value.shape != t.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                kind = ValueError if isinstance(value, Tensor) else TypeError
                raise kind(
                    f"{_title(self)}: expected {name} as a tensor of the shape of t, "
                    f"{tuple(t.shape)}, got {got}"
                )

    return check


def check_log_prob(part: object, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise unless a process returned a log-density of each sample."""
    check_each(value, len(kwargs["x"] if "x" in kwargs else args[-1]), part, "log-densities")


def check_weights(
    part: object, weights: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise unless a weighting returned a weight for each time."""
    t = kwargs["t"] if "t" in kwargs else args[-1]
    check_each(weights, t.shape[0], part, "weights")


def check_times_and_weights(
    part: object, drawn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise unless a time sampler returned n times and n weights."""
    if not isinstance(drawn, tuple) or len(drawn) != 2:
        raise TypeError(
            f"{type(part).__name__}: expected times and weights, got {type(drawn).__name__}"
        )
    n = kwargs["n"] if "n" in kwargs else args[-1]
    for name, value in zip(("times", "weights"), drawn, strict=True):
        check_each(value, n, part, name)


def _is_own(function: Any) -> bool:
    """Return whether a function is defined in this package."""
    return str(getattr(function, "__module__", "")).startswith(f"{__package__}.")


def _title(part: object) -> str:
    if isinstance(part, str):
        return part
    return part.__name__ if isinstance(part, type) else type(part).__name__
