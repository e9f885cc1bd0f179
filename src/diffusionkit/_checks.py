"""Argument validation. Errors state what was expected and what was received.

Values are read only where this needs no device synchronization: on the CPU and outside compiled
code. `value_checks`, or the environment variable DIFFUSIONKIT_CHECKS, turns these checks on for all
devices. Shapes, dtypes and devices are always checked.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import NoneType

import torch
from torch import Tensor

from ._hints import batch_advice, dtype_advice, number_advice, shape_advice, time_advice
from ._tracing import traced

# A context variable, so that other threads are not slowed down.
_everywhere: ContextVar[bool] = ContextVar(
    "value_checks", default=os.environ.get("DIFFUSIONKIT_CHECKS", "0") not in ("", "0")
)


@contextlib.contextmanager
def value_checks() -> Iterator[None]:
    """Check values on every device, not only on the CPU, in this thread.

    Reading a value makes the host wait for the device, so that on devices neither arguments nor
    results are checked for NaN, infinities and numbers out of range. To find out where training or
    sampling fails there, run it inside `with value_checks():`, or with the environment variable
    DIFFUSIONKIT_CHECKS=1. Compiled code and `torch.func` transforms are never checked.

    >>> from diffusionkit.testing import value_checks
    >>> with value_checks():
    ...     pass  # train, sample
    """
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


_LARGEST_COUNT = 2**31 - 1


def readable(x: Tensor) -> bool:
    """Return whether values can be read without stalling a device, a compiler or a vmap.

    Inside `value_checks` devices may be stalled.
    """
    return (x.is_cpu or (_everywhere.get() and not x.is_meta)) and not traced()


def can_be_read(x: Tensor) -> bool:
    """Return whether values can be read, even if a device has to be waited for."""
    if traced():
        return False
    started: bool = not x.is_cpu and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return not (x.is_meta or (started and torch.cuda.is_current_stream_capturing()))


def check_state(x: Tensor, name: str = "x") -> None:
    """Raise unless x is a floating-point tensor (B, *D) with B >= 1 and no empty dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (B, *D), got {batch_advice(x)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}{dtype_advice(x)}")
    if x.ndim == 0:
        raise ValueError(f"{name}: expected shape (B, *D), got a tensor without dimensions")
    if x.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty batch, got shape {tuple(x.shape)}")


def sums_finitely(x: Tensor) -> bool:
    """Return whether the sum of all values is finite, in float32 at least: then so is each."""
    x = x if x.dtype.itemsize >= 4 else x.float()
    return math.isfinite((x.detach() if x.requires_grad else x).sum().item())


def check_finite(x: Tensor, name: str = "x") -> None:
    """Raise if x contains a NaN or an infinity (read on the CPU only)."""
    if readable(x) and not sums_finitely(x):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values, got {bad} that are NaN or infinite")


def check_samples(x: Tensor, name: str = "samples") -> None:
    """Raise if the result of a sampler contains a NaN or an infinity, on any device: it is over."""
    if can_be_read(x) and not sums_finitely(x):
        bad = int((~torch.isfinite(x)).reshape(len(x), -1).any(1).sum())
        if bad:
            raise ValueError(
                f"{name}: expected finite values, got NaN or infinity in {bad} of {len(x)} "
                "samples; common causes are a network that diverged in training, at too large a "
                "learning rate; noise labels that it was not trained on; a time at which the "
                "process has no noise or no signal; and numbers above 65504 in float16"
            )


def check_times(t: Tensor, T: float, batch: int | None = None, like: Tensor | None = None) -> None:
    """Raise unless t is a floating-point tensor (B,) on the state's device, within [0, T]."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t: expected a tensor of shape (B,), got {time_advice(t, batch)}")
    if t.ndim != 1 or (batch is not None and t.shape[0] != batch):
        expected = "(B,)" if batch is None else f"({batch},)"
        raise ValueError(f"t: expected one time for each sample, shape {expected}, "
                         f"got {time_advice(t, batch)}")  # fmt: skip
    if not t.dtype.is_floating_point:
        raise TypeError(f"t: expected a floating-point tensor, got {t.dtype}")
    if like is not None and t.device != like.device:
        raise ValueError(f"t: expected the device of x, {like.device}, got {t.device}")
    if getattr(t, "_within", None) != T and readable(t) and t.numel():  # see _batch_times
        low, high = (t.detach() if t.requires_grad else t).aminmax()
        # A NaN fails this test.
        if not (low.item() >= 0.0 and high.item() <= T * (1 + 1e-6)):
            raise ValueError(f"t: expected times within [0, T] = [0, {T:g}], "
                             f"got values from {low.item():g} to {high.item():g}")  # fmt: skip


def check_t_min(t_min: float, T: float) -> None:
    """Raise unless the smallest time is a number in [0, T)."""
    check_number(t_min, "t_min")
    if not 0.0 <= t_min < T:
        raise ValueError(f"t_min: expected a time in [0, T) = [0, {T:g}), got {t_min}")


def check_t_end(t_end: float) -> None:
    """Raise unless the last time of a sampler is a number >= 0."""
    check_number(t_end, "t_end")
    if not 0.0 <= t_end < math.inf:
        raise ValueError(f"t_end: expected a finite time >= 0, got {t_end}")


def check_log_snr(log_snr: Sequence[float], first: float, last: float) -> None:
    """Raise unless the log-SNR is finite at a first time, near the data, and at the last, T."""
    if not math.isfinite(log_snr[1]):
        raise ValueError(
            f"sde: expected a finite log-SNR at T = {last:g}, got {log_snr[1]:g}, since "
            f"{'alpha(T) = 0' if log_snr[1] < 0 else 'sigma(T) = 0'}; end the process earlier"
        )
    if not math.isfinite(log_snr[0]):
        raise ValueError(
            f"t_min: expected a time with noise, got {first:g}, where the log-SNR is "
            f"{log_snr[0]:g}, since sigma({first:g}) = 0"
        )


def check_transition(s: Tensor, t: Tensor, T: float) -> None:
    """Raise unless s and t are times (B,) within [0, T] with s <= t."""
    check_times(s, T)
    check_times(t, T, s.shape[0], s)
    if readable(s) and readable(t) and bool((s > t).any()):
        got = f"s = {s.tolist()[:4]} and t = {t.tolist()[:4]}"
        raise ValueError(f"s, t: expected s <= t, got {got}")


def check_step_times(s: Tensor, t: Tensor, T: float, x: Tensor) -> None:
    """Raise unless s and t are times (B,) for a state x, within [0, T], with s < t."""
    check_times(t, T, x.shape[0], x)
    check_times(s, T, x.shape[0], x)
    if readable(t) and not bool((s < t).all()):
        raise ValueError(f"s, t: expected s < t, got s = {s.tolist()[:4]} and t = {t.tolist()[:4]}")


def check_same(x: Tensor, like: Tensor, name: str, like_name: str) -> None:
    """Raise unless x has the shape, dtype and device of another tensor."""
    for what, got, expected in (
        ("shape", tuple(x.shape), tuple(like.shape)),
        ("dtype", x.dtype, like.dtype),
        ("device", x.device, like.device),
    ):
        if got != expected:
            raise ValueError(f"{name}: expected the {what} of {like_name}, {expected}, got {got}")


def check_reference(reference: Tensor, x0: Tensor) -> None:
    """Raise unless reference data (n, *D) are finite and match the data x0 (B, *D)."""
    check_state(reference, "reference")
    if reference.shape[1:] != x0.shape[1:]:
        raise ValueError(f"reference: expected shape (n, *{tuple(x0.shape[1:])}), "
                         f"got {tuple(reference.shape)}")  # fmt: skip
    if reference.dtype != x0.dtype or reference.device != x0.device:
        check_same(reference[:1], x0[:1], "reference", "x0")
    check_finite(reference, "reference")


def fits(x: Tensor, like: Tensor) -> bool:
    """Return whether a tensor broadcasts to the shape of another."""
    sizes = zip(reversed(x.shape), reversed(like.shape), strict=False)
    return x.ndim <= like.ndim and all(n in (1, m) for n, m in sizes)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape (B, *D) as a tuple, or raise unless it consists of positive integers."""
    if not isinstance(shape, (tuple, list)):  # torch.Size is a tuple
        hint = "; pass the shape of the samples, such as (16, 3, 32, 32)"
        got = batch_advice(shape) + ("" if isinstance(shape, Mapping) else hint)
        raise TypeError(f"shape: expected positive integers (B, *D), got {got}")
    sizes = tuple(shape)
    if not sizes or not all(type(n) is not bool and isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"shape: expected positive integers (B, *D), got {shape_advice(shape)}")
    if math.prod(sizes) >= 2**48:
        raise ValueError("shape: expected a tensor that fits in memory, got 2^48 numbers or more")
    return sizes


def check_part(part: object, kind: type, name: str) -> None:
    """Raise unless an object is an instance of a class."""
    if not isinstance(part, kind):
        got = type(part).__name__
        if isinstance(part, type):
            hint = f"; pass an instance, {part.__name__}(...)" if issubclass(part, kind) else ""
            got = f"the class {part.__name__}{hint}"
        elif isinstance(part, str):
            got = f"the string {part[:40]!r}; pass an instance of a {kind.__name__}"
        raise TypeError(f"{name}: expected a {kind.__name__}, got {got}")


def check_number(value: float, name: str) -> None:
    """Raise unless a value is a number, not an array or a tensor, that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {number_advice(value, float)}")
    if isinstance(value, int) and value.bit_length() > 1000:
        raise ValueError(f"{name}: expected a number that a float can hold, got about 10^"
                         f"{int(value.bit_length() * math.log10(2))}")  # fmt: skip


def check_finite_number(value: float, name: str) -> None:
    """Raise unless a value is a finite number."""
    check_number(value, name)
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_interval(low: float, high: float, low_name: str, high_name: str) -> None:
    """Raise unless two numbers are finite and low < high."""
    check_number(low, low_name)
    check_number(high, high_name)
    if not (low < high and math.isfinite(high - low)):
        names, order = f"{low_name}, {high_name}", f"{low_name} < {high_name}"
        raise ValueError(f"{names}: expected finite {order}, got {low} and {high}")


def check_data_range(data_range: object) -> tuple[float, float]:
    """Return the range of the data as a pair, or raise unless it is finite, (low, high)."""
    if not isinstance(data_range, (tuple, list)) or len(data_range) != 2:
        got = type(data_range).__name__
        got += f" of {len(data_range)}" if isinstance(data_range, (tuple, list)) else ""
        raise TypeError(f"data_range: expected two numbers (low, high), got {got}")
    low, high = data_range
    check_number(low, "data_range")
    check_number(high, "data_range")
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"data_range: expected finite low < high, got {low} and {high}")
    return low, high


def check_positive(value: float, name: str) -> None:
    """Raise unless a number is finite and positive."""
    check_number(value, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_count(value: int, name: str, *, least: int = 1, most: int = _LARGEST_COUNT) -> None:
    """Raise unless a number is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {number_advice(value, int)}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {_short(value)}")
    if value > most:
        raise ValueError(f"{name}: expected an integer <= {most}, got {_short(value)}")


def _short(value: int) -> str:
    """Return an integer as text, without the digits of an enormous one."""
    digits = int(value.bit_length() * math.log10(2))
    return str(value) if digits < 40 else f"{'-' if value < 0 else ''}10^{digits}"


def check_flag(value: bool, name: str) -> None:
    """Raise unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless a value is among the choices: strings, whole numbers or None."""
    if not isinstance(value, (str, int, NoneType)) or value not in choices:
        got = repr(value) if isinstance(value, (str, int)) else type(value).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {got}")


def check_callable(value: object, name: str) -> None:
    """Raise unless a value can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")


def check_sequence(values: object, name: str) -> None:
    """Raise unless values are a list, a tuple or another sequence, but not a string."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: expected a sequence, got {type(values).__name__}")


def check_mapping(values: object, name: str) -> None:
    """Raise unless values are a mapping whose keys are strings."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name}: expected a dictionary by name, got {type(values).__name__}")


def check_floating_dtype(dtype: torch.dtype | None, name: str = "dtype") -> None:
    """Raise unless a value is a floating-point dtype or None."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype or None, got {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {dtype}")


def check_target_device(device: torch.device | str | None, name: str = "device") -> None:
    """Raise unless a value names a device that this machine has, or is None."""
    if device is None or isinstance(device, torch.device):
        return
    if not isinstance(device, str):
        raise TypeError(f"{name}: expected a torch.device, a string or None, "
                        f"got {type(device).__name__}")  # fmt: skip
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name}: expected a device of this machine, got {device!r}") from error


def numbers(values: object, name: str) -> Tensor:
    """Return numbers or a real tensor in float64, on the CPU if its device has none, or raise."""
    if isinstance(values, (str, bytes, dict, set, bool)):
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__}")
    if isinstance(values, Tensor):
        check_known(values, name)
    try:
        if isinstance(values, Tensor) and values.device.type == "mps":
            values = values.cpu()
        return torch.as_tensor(values, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        got = type(values).__name__
        raise TypeError(f"{name}: expected numbers, got {got}: {error}") from error


def as_item(item: object, name: str) -> Tensor:
    """Return an item of a data set, or the first part of a tuple, as a tensor, or raise."""
    if isinstance(item, tuple) and item and isinstance(item[0], Tensor) and item[0].ndim:
        item = item[0]
    try:
        return torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(item).__name__
        raise TypeError(f"{name}: expected a tensor or numbers, got {got}") from error


def check_known(x: Tensor, name: str) -> None:
    """Raise unless x is a tensor of real numbers that has data."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.is_complex() or x.is_meta:
        what = "a meta tensor" if x.is_meta else str(x.dtype)
        raise TypeError(f"{name}: expected real numbers, got {what}")


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is enabled for the device of a tensor."""
    kind = x.device.type
    # torch raises if a device, such as meta, has no autocast; torch 2.8 cannot trace the question.
    traced = torch.compiler.is_compiling() and kind != "meta"
    return (traced or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def check_device(x: Tensor, like: Tensor, name: str, like_name: str = "x") -> None:
    """Raise unless x is on the device of another tensor."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, "
                         f"got {x.device}")  # fmt: skip


def check_dtype(
    x: Tensor, like: Tensor, name: str, like_name: str = "x", *, autocast: bool = False
) -> None:
    """Raise unless x has the dtype of another tensor, or autocast is allowed and converts it."""
    if x.dtype != like.dtype and not (autocast and x.is_floating_point() and autocast_enabled(x)):
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {x.dtype}")
