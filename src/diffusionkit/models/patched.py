"""A score model of large fields made of one of patches: multi-diffusion."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from .._batch_conditions import rows_of
from .._checks import check_choice, check_count, check_flag
from .._coefficients import Coefficient
from .._grid_times import grid_rows, kernel
from .._keywords import explained
from .._model_checks import check_model
from .._nfe import uncounted
from ..interfaces import ScoreModel
from ..random import seeded
from ..values import Prediction
from ._windows import AxisWindows, Window, axis_windows, coordinates, windows

_T = TypeVar("_T")


@explained
class PatchedModel(ScoreModel):
    r"""A score model of a field of any size, made of a model of patches (multi-diffusion).

    The model predicts in overlapping windows of the field, and the predictions are averaged:

    .. math::
        \hat x_0(x, t) = \sum_k w_k \, R_k^T\, \hat x_0^{patch}(R_k x, t), \quad
        \sum_k w_k = 1 \text{ at each point},

    where R_k cuts out window k. The same holds for the model's own output, which is averaged, so
    that no digits are lost at any noise. The windows lie `patch - overlap` apart, the last is moved
    inwards to the edge. Points within `margin` of an inner end of a window, which lack context,
    have weight 0, and the weights rise from there to 1 over the rest of the overlap. A network of
    convolutions whose receptive field reaches no further than `margin` predicts the same as on the
    whole field.

    Only `batch` windows are evaluated at a time: except for a few tensors of the field's size,
    memory does not depend on that size. All windows together count as one evaluation, `nfe`.

    Conditions (B, C', \*field) are cut like the state. Other conditions of a sample are passed to
    each of its windows.

    Correlations longer than a patch are lost, and those beyond half of it are weakened. Everything
    that a score model does works: samplers, guidance, constraints and likelihoods, which are those
    of the averaged model. Train the model of patches itself, on `random_crops`.

    Args:
        model: the score model of patches (B, C, \*patch).
        patch: the size of a window, a number or one for each axis of the field.
        overlap: the number of points that neighboring windows share along an axis, a number or one
            for each axis.
        margin: the number of points at an inner end of a window that are not used, a number or one
            for each axis; at most half of the overlap. None for a quarter of it.
        blend: "cosine" for smooth weights, "uniform" for equal ones.
        periodic: whether the field is periodic, with windows across its edges; for all axes or one
            for each.
        shift: move the windows at every time, by an offset that is a function of the time, so that
            the ends of windows are never at the same place twice. With overlap 0 this costs hardly
            more than the patches alone. The prediction is then not a continuous function of time:
            do not use it for likelihoods and adaptive solvers.
        positions: pass the coordinates of the points to the model, a condition `positions`
            (B, d, \*patch) within [-1, 1], for networks such as `PositionChannels`.
        batch: the number of windows in one call of the model.
        activation_checkpointing: recompute the network's activations in the backward pass, so that
            gradients, such as those of guidance, need no more memory for a larger field.

    Raises:
        ValueError: if overlap is not within [0, patch), margin not within [0, overlap / 2], or
            blend is unknown; in a call, if the state is not (B, C, \*field) with as many axes and
            at least the size of a patch.
        TypeError: if model is not a ScoreModel, or an argument has another type.

    Source: Bar-Tal et al., MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation,
    2023, arXiv 2302.08113; shifts: Frolov et al., SpotDiffusion, 2024, arXiv 2407.15507.

    >>> import torch
    >>> from diffusionkit import (
    ...     DDIM, EpsModel, PatchedModel, PCSampler, VPSDE
    ... )
    >>> model = EpsModel(lambda x, noise_label: 0.9 * x, VPSDE())
    >>> sampler = PCSampler(PatchedModel(model, 8, 4), DDIM(), steps=5)
    >>> sampler((1, 3, 100, 50)).shape
    torch.Size([1, 3, 100, 50])
    """

    def __init__(
        self,
        model: ScoreModel,
        patch: int | Sequence[int],
        overlap: int | Sequence[int],
        *,
        margin: int | Sequence[int] | None = None,
        blend: str = "cosine",
        periodic: bool | Sequence[bool] = False,
        shift: bool = False,
        positions: bool = False,
        batch: int = 16,
        activation_checkpointing: bool = False,
    ) -> None:
        """Validate and store the arguments."""
        super().__init__()
        check_model(model)
        _check_sizes(patch, "patch", least=1)
        _check_sizes(overlap, "overlap")
        if margin is not None:
            _check_sizes(margin, "margin")
        for value in [periodic] if isinstance(periodic, bool) else _items(periodic, "periodic"):
            check_flag(value, "periodic")
        check_choice("blend", blend, ("cosine", "uniform"))
        check_flag(shift, "shift")
        check_flag(positions, "positions")
        check_count(batch, "batch")
        check_flag(activation_checkpointing, "activation_checkpointing")
        self.model = model
        self.sde = model.sde
        self.patch = patch
        self.overlap = overlap
        self.margin = margin
        self.blend = blend
        self.periodic = periodic
        self.shift = shift
        self.positions = positions
        self.batch = batch
        self.activation_checkpointing = activation_checkpointing
        self.data_range = getattr(model, "data_range", None)
        self.variance = getattr(model, "variance", None)
        given = (patch, overlap, margin, periodic)
        dims = {len(value) for value in given if isinstance(value, Sequence)}
        if len(dims) > 1:
            raise ValueError(
                "patch, overlap, margin, periodic: expected a number or one for each axis, got "
                f"{', '.join(map(repr, given))}"
            )
        self._axes(dims.pop() if dims else 1)

    def _axes(self, dims: int) -> list[tuple[int, int, int, bool]]:
        """Return patch, overlap, margin and whether it is periodic for each axis of a field."""
        patches, overlaps = _each(self.patch, dims), _each(self.overlap, dims)
        margins, periods = _each(self.margin, dims), _each(self.periodic, dims)
        axes = []
        for patch, overlap, margin, periodic in zip(
            patches, overlaps, margins, periods, strict=True
        ):
            if not overlap < patch:
                raise ValueError(f"overlap: expected less than the patch, {patch}, got {overlap}")
            least = overlap // 4 if margin is None else margin
            if 2 * least > overlap:
                raise ValueError(
                    f"margin: expected at most half of the overlap, {overlap}, got {least}"
                )
            axes.append((patch, overlap, least, periodic))
        return axes

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, C, *field) at times t (B,).

        Raises:
            ValueError: if the state has another number of axes than the patch, or is smaller.
        """
        alpha, sigma = kernel(self.sde, x, t)
        blended = _Blend(x)
        for rows in self._windows(x, t):
            once = blended.parts is None or torch.compiler.is_compiling()
            with contextlib.nullcontext() if once else uncounted():
                blended.add(rows, self._patches(x, t, cond, rows))
        return blended.prediction(alpha, sigma)

    def _windows(self, x: Tensor, t: Tensor) -> Iterator[list[Window]]:
        """Return the windows of all samples, as many at a time as are evaluated together."""
        sizes, given = tuple(x.shape[2:]), [
            len(v) for v in (self.patch, self.overlap, self.margin, self.periodic)
            if isinstance(v, Sequence)
        ]  # fmt: skip
        if not sizes or (given and given[0] != len(sizes)):
            field = f"a field of {given[0]} axes" if given else "a field"
            raise ValueError(f"x: expected {field}, (B, C, *field), got shape {tuple(x.shape)}")
        axes = self._axes(len(sizes))
        if any(size < axis[0] for size, axis in zip(sizes, axes, strict=True)):
            patch = tuple(axis[0] for axis in axes)
            raise ValueError(f"x: expected a field of at least the patch, {patch}, got {sizes}")
        groups: list[tuple[range, list[AxisWindows]]] = []
        for samples, time in self._times(t):
            found = [
                axis_windows(
                    size,
                    patch,
                    overlap,
                    margin,
                    smooth=self.blend == "cosine",
                    periodic=periodic,
                    offset=_offset(time, k, patch - overlap),
                    like=x,
                )
                for k, (size, (patch, overlap, margin, periodic)) in enumerate(
                    zip(sizes, axes, strict=True)
                )
            ]
            groups.append((samples, found))
        return windows(groups, self.batch)

    def _times(self, t: Tensor) -> list[tuple[range, float | None]]:
        """Return the time of consecutive samples with equal windows, None for no shift."""
        if not self.shift:
            return [(range(len(t)), None)]
        groups: list[tuple[range, float | None]] = []
        for k, time in enumerate(t.detach().tolist()):
            first = groups.pop()[0].start if groups and groups[-1][1] == time else k
            groups.append((range(first, k + 1), time))
        return groups

    def _patches(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Any], rows: list[Window]
    ) -> Prediction:
        """Return the model's prediction in windows."""
        samples = _samples(rows, x)
        places = [row.place for row in rows]

        def cut(value: Any) -> Any:
            field = isinstance(value, Tensor) and value.ndim == x.ndim
            if field and len(value) == len(x) and value.shape[2:] == x.shape[2:]:
                return torch.cat([value[place] for place in places])
            return rows_of(value, len(x), samples)

        given = {name: cut(value) for name, value in cond.items()}
        if self.positions:
            if "positions" in cond:
                raise ValueError(
                    "positions: expected no condition of this name, which the model makes, got one"
                )
            size = x.shape[2:]
            patch = [axis.patch for axis in rows[0].axes]
            given["positions"] = torch.cat(
                [
                    coordinates(row.start, patch, size, x).expand(
                        len(row.samples), *[-1] * (x.ndim - 1)
                    )
                    for row in rows
                ]
            )
        patches, times = cut(x), grid_rows(t, samples)
        if self.activation_checkpointing and torch.is_grad_enabled():
            prediction: Prediction = checkpoint(
                lambda state: self.model.predict(state, times, **given),
                patches,
                use_reentrant=False,
            )
            return prediction
        return self.model.predict(patches, times, **given)


class _Blend:
    """The weighted sum of predictions in windows, in the model's own parameterization."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.parts: dict[str, Tensor] | None = None
        self._coefficients: list[Coefficient] = []

    def add(self, rows: list[Window], prediction: Prediction) -> None:
        """Add the predictions in some windows."""
        found = _parts(prediction)
        if self.parts is None:
            self.parts = {name: part.new_zeros(self.x.shape) for name, part in found.items()}
            self._coefficients = [
                c.new_empty(len(self.x)) if isinstance(c, Tensor) else c
                for c in prediction.parameterization
            ]
        first = 0
        for row in rows:
            weights, last = row.weights, first + len(row.samples)
            for name, part in found.items():
                self.parts[name][row.place] += weights * part[first:last]
            first = last
        samples = _samples(rows, self.x)
        for mine, value in zip(self._coefficients, prediction.parameterization, strict=True):
            if isinstance(mine, Tensor):
                mine[samples] = value

    def prediction(self, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """Return the prediction in the whole field."""
        parts = {} if self.parts is None else self.parts
        learned = {name: parts.get(name) for name in ("log_var", "log_var_fraction")}
        if "output" in parts:
            a, b = self._coefficients
            return Prediction.from_output(
                self.x, parts["output"], alpha, sigma, a=a, b=b, **learned
            )
        return Prediction(self.x, parts["x0"], parts["eps"], alpha, sigma, **learned)


def _parts(prediction: Prediction) -> dict[str, Tensor]:
    """Return the tensors that a prediction consists of: nothing is converted."""
    output, fraction = prediction.output, prediction.log_var_fraction
    parts = {"x0": prediction.x0, "eps": prediction.eps} if output is None else {"output": output}
    learned = {"log_var": prediction.log_var, "log_var_fraction": fraction}
    return parts | {name: value for name, value in learned.items() if value is not None}


def _samples(rows: list[Window], x: Tensor) -> Tensor:
    """Return the index of the sample of each window."""
    return torch.tensor([sample for row in rows for sample in row.samples], device=x.device)


def _offset(time: float | None, axis: int, stride: int) -> int:
    """Return the offset of windows along an axis at a time, from 0 to stride - 1."""
    if time is None:
        return 0
    # The bits of the time, so that neighboring times have independent offsets.
    bits = int(torch.tensor(time, dtype=torch.float64).view(torch.int64)) & (2**63 - 1)
    return int(torch.randint(stride, (1,), generator=seeded(bits, axis)))


def _each(value: _T | Sequence[_T], dims: int) -> list[_T]:
    """Return a value for each axis."""
    return list(value) if isinstance(value, Sequence) else [value] * dims


def _items(values: Any, name: str) -> list[Any]:
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(
            f"{name}: expected one value, or one for each axis, got {type(values).__name__}"
        )
    return list(values)


def _check_sizes(values: int | Sequence[int], name: str, *, least: int = 0) -> None:
    """Raise unless values are an integer, or one for each axis."""
    items: list[Any] = _items(values, name) if isinstance(values, (tuple, list)) else [values]
    for value in items:
        check_count(value, name, least=least)
