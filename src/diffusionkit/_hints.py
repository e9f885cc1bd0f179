"""Advice that errors end with: how to make what was expected of what was received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor


def batch_advice(value: object) -> str:
    """Return a value that is no tensor in words, with how to make a batch of it."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        parts = [_part(part) for part in value[:3]]
        got = f"{kind} of {len(value)}" + (f": {', '.join(parts)}" if parts else "")
        if parts and isinstance(value[0], Tensor):
            if len({getattr(part, "shape", None) for part in value[:8]}) == 1:
                return f"{got}; pass torch.stack(batch), or one of them"
            if len(value) == 2:
                return f"{got}; unpack what a loader yields: images, labels = batch"
            return f"{got}; pass one of them, batch[0]"
        return f"{got}; make a tensor of it: torch.tensor(batch)" if parts else got
    if isinstance(value, Mapping):
        names = [repr(name) for name in value if isinstance(name, str)][:4]
        first = f"; pass one of its entries, batch[{names[0]}]" if names else ""
        return f"{kind} with {', '.join(names) or 'no names'}{first}"
    if kind == "ndarray":
        return f"{kind}; pass torch.from_numpy(x).float()"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{kind} {value!r:.20}"
    if isinstance(getattr(value, "images", None), Tensor):
        return f"{kind}; pass its images, scaled: batch.images / 127.5 - 1"
    module = type(value).__module__
    if module.startswith("PIL"):
        return f"{kind} of PIL; read it with torchvision.transforms.ToTensor() or the like"
    return f"the class {value.__name__}" if isinstance(value, type) else kind


def dtype_advice(x: Tensor) -> str:
    """Return how to convert a tensor to a floating-point one, "; ..." or ""."""
    if x.dtype == torch.uint8:
        return "; convert 8-bit images, to [-1, 1] by x / 127.5 - 1 or to [0, 1] by x / 255"
    if x.dtype.is_complex:
        return "; pass torch.view_as_real(x)"
    return "; convert it by x.float()"


def number_advice(value: object, kind: type[int] | type[float]) -> str:
    """Return what was passed as a number, with how to make one of a scalar of NumPy or torch.

    Parts keep their arguments for files and comparisons, where these are no numbers.
    """
    got = type(value).__name__
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return got
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # many elements, or meta
        return got
    whole = kind is float or number.is_integer()
    return f"{got} {number:g}; convert it by {kind.__name__}(x)" if whole else f"{got} {number:g}"


def shape_advice(sizes: Sequence[object]) -> str:
    """Return what was passed as a shape, with how to make integers of those of NumPy."""
    if any(isinstance(n, Tensor) for n in sizes):
        return batch_advice(sizes)
    sizes = tuple(sizes)
    foreign = any(hasattr(n, "dtype") and hasattr(n, "__index__") for n in sizes)
    hint = "; convert it by tuple(map(int, shape))" if foreign else ""
    return f"{sizes!r:.99}{hint}"


def _part(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (type, ModuleType)):
        return f"the {'class' if isinstance(value, type) else 'module'} {value.__name__}"
    return type(value).__name__


def label_advice(labels: object, batch: int) -> str:
    """Return how to make class labels (B,) of something else, "; ..." or ""."""
    if isinstance(labels, Tensor):
        if labels.ndim == 0 or labels.shape == (1,):
            return f"; pass one for each sample: class_labels.expand({batch})"
        if labels.ndim == 2 and len(labels) == batch:
            if labels.shape[1] == 1:
                return "; drop the second dimension by class_labels.squeeze(1)"
            return "; make classes of one-hot labels by class_labels.argmax(1)"
        if labels.ndim == 1 and labels.dtype != torch.int64:
            return "; convert them by class_labels.long()"
        return ""
    if isinstance(labels, int) and not isinstance(labels, bool):
        return f"; pass one for each sample: class_labels=torch.full(({batch},), {labels!r:.20})"
    if labels is None:
        return "; pass class_labels=torch.tensor([...]), one for each sample"
    return "; pass torch.as_tensor(class_labels)"


def time_advice(t: object, batch: int | None) -> str:
    """Return what was passed as times (B,), with how to make times of a number."""
    if isinstance(t, Tensor):
        hint = f"; pass t.expand({batch or 'B'})" if t.shape in ((), (1,)) else ""
        return f"{tuple(t.shape)}{hint}"
    if isinstance(t, (int, float)) and not isinstance(t, bool):
        number = float(t) if abs(t) < 1e9 else "..."
        return f"{type(t).__name__}; pass torch.full(({batch or 'B'},), {number})"
    return type(t).__name__


def layout_advice(x: Tensor, channels: int, dims: int) -> str:
    """Return how to make a batch of channels first of another tensor, "; ..." or ""."""
    if x.ndim == dims + 2 and x.shape[-1] == channels:
        order = ", ".join(map(str, (0, dims + 1, *range(1, dims + 1))))
        return f"; put channels first by x.permute({order})"
    if x.ndim == dims + 1 and dims and x.shape[0] == channels:
        return "; add the batch by x.unsqueeze(0)"
    if x.ndim == dims + 1 and dims and channels == 1:
        return "; add the channel by x.unsqueeze(1)"
    return ""
