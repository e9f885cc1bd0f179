"""Subsequences of a chain's steps, as improved DDPM's code selects them."""

from __future__ import annotations

from collections.abc import Sequence

_ALLOWED = 'a string "ddimN", "N" or "N,N,...", an integer or a sequence of integers'


def subsequence(spec: str | int | Sequence[int], steps: int) -> list[int]:
    """Return the selected steps, increasing and counted from 0, of a chain of `steps`.

    "ddimN" selects every k-th step, for the smallest k that gives N. Otherwise the chain is cut
    into as many equal sections as there are counts; each count is the number of steps taken from
    its section, including the first and the last.

    Args:
        spec: "ddimN", "N", "N,N,...", an integer or a sequence of integers.
        steps: the number of steps of the chain.

    Raises:
        ValueError: if the specification is invalid or requests more steps than there are.
        TypeError: if the specification has another type.
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _strided(_number(spec[4:], spec), steps)
    if isinstance(spec, str):
        counts = [_number(part, spec) for part in spec.split(",")]
    else:
        counts = [spec] if isinstance(spec, int) else list(spec) if _is_list(spec) else []
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
            raise TypeError(f"spec: expected {_ALLOWED}, got {spec!r}")
    size, extra = divmod(steps, len(counts))
    selected, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"spec: expected 1 to {length} of the {length} steps in section {section} "
                f"of {len(counts)}, got {count} in {spec!r}"
            )
        selected += [start + step for step in _spread(count, length)]
        start += length
    return selected


def _is_list(spec: object) -> bool:
    return isinstance(spec, Sequence)


def _number(text: str, spec: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise ValueError(f"spec: expected {_ALLOWED}, got {spec!r}")
    return int(text)


def _strided(count: int, steps: int) -> list[int]:
    possible = [-(-steps // stride) for stride in range(1, steps)]
    if count not in possible:
        above = min((n for n in possible if n > count), default=None)
        below = max((n for n in possible if n < count), default=None)
        near = " or ".join(f'"ddim{n}"' for n in (below, above) if n is not None)
        raise ValueError(
            f"spec: expected a number of steps that an integer stride over {steps} gives, "
            f'the nearest being {near}, got "ddim{count}"'
        )
    return list(range(0, steps, 1 + possible.index(count)))


def _spread(count: int, length: int) -> list[int]:
    """Return `count` of the steps 0 ... length - 1, evenly spaced up to rounding."""
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    selected, position = [], 0.0
    for _ in range(count):
        selected.append(round(position))
        position += stride  # accumulated as in the released code: its rounding matters
    return selected
