"""Power-function averages of a model's weights, also of lengths chosen after training."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_count, check_floating_dtype, check_number, check_part, check_sequence
from .._files import CheckpointError, read_torch
from .._keywords import explained
from .._repr import described
from .._writing import checked_path, save_torch
from ..distributed._sharded import write_whole
from .ema import EMA, Averages, Model_co

logger = logging.getLogger(__name__)

FORMAT = "diffusionkit.power_ema"
VERSION = 1

_PARTS: dict[str, Any] = {"updates": int, "sigma_rel": float, "averaged": list, "model": dict}
_UNIFORM = 1 / math.sqrt(12)


def power_exponent(sigma_rel: float) -> float:
    r"""Return the exponent gamma of the profile with a given relative standard deviation.

    .. math::
        \sigma_{rel}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}

    Args:
        sigma_rel: the standard deviation of the profile t^gamma on [0, 1].

    Raises:
        ValueError: if sigma_rel is outside (0, 0.2887), 12^(-1/2) being that of a flat profile.
        TypeError: if sigma_rel is not a number.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
    2024, arXiv 2312.02696 (section 3.1).

    >>> from diffusionkit import power_exponent
    >>> round(power_exponent(0.10), 4)
    6.9372
    """
    check_number(sigma_rel, "sigma_rel")
    if not 0.0 < sigma_rel < _UNIFORM:
        raise ValueError(f"sigma_rel: expected a number in (0, {_UNIFORM:.4f}), got {sigma_rel}")
    # In y = gamma + 7/3 this is y^3 - 3 p y = 2 q, with three real roots; gamma is the largest.
    rate = sigma_rel**-2
    p = (rate + 1 / 3) / 3
    q = -1 / 27 - 2 * rate / 3
    return 2 * math.sqrt(p) * math.cos(math.acos(q / p**1.5) / 3) - 7 / 3


@dataclass(frozen=True)
class _PowerDecay:
    """The decay beta_t, for an exponent gamma."""

    exponent: float

    def __call__(self, update: int) -> float:
        keep: float = (1 - 1 / update) ** (self.exponent + 1)
        return keep


@explained
class PowerEMA(Averages, Generic[Model_co]):
    r"""Averages of a model's weights over a fixed fraction of the training so far.

    .. math::
        \bar\theta_t = \beta_t \bar\theta_{t-1} + (1 - \beta_t) \theta_t, \quad
        \beta_t = (1 - 1/t)^{\gamma + 1}

    at update t = 1, 2, ..., so that the share of the weights of update s is proportional to
    s^gamma: the profile stretches with the training, and the initial weights have no share. Its
    length is sigma_rel, the standard deviation of s / t. From snapshots of two lengths, saved at
    intervals, `reconstruct_ema` computes the average of any other length after training.

    Args:
        model: the model whose weights are averaged.
        sigma_rels: the lengths, each in (0, 0.2887).

    Attributes:
        averages: the `EMA` of each length, with `model` and `applied`.

    Raises:
        ValueError: if there are no lengths, two are equal or one is out of range.
        TypeError: if model is not a Module, or a length is not a number.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
    2024, arXiv 2312.02696 (sections 3.1 and 3.2).

    >>> import torch
    >>> from torch import nn
    >>> from diffusionkit import PowerEMA
    >>> model = nn.Linear(1, 1)
    >>> ema = PowerEMA(model, sigma_rels=(0.05, 0.10))
    >>> ema.update(model)
    >>> with ema.averages[0.05].applied(model):
    ...     y = model(torch.ones(1, 1))
    """

    averages: Mapping[float, EMA[Model_co]]

    def __init__(self, model: Model_co, sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        """Copy the model once for each length."""
        super().__init__()
        check_sequence(sigma_rels, "sigma_rels")
        for sigma_rel in sigma_rels:
            check_number(sigma_rel, "sigma_rels")
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels: expected distinct numbers, got {sigma_rels}")
        self.averages = {s: EMA(model, _PowerDecay(power_exponent(s))) for s in sigma_rels}
        for sigma_rel, average in self.averages.items():
            self.add_module(_name(sigma_rel), average)

    @override
    def __repr__(self) -> str:
        model = next(iter(self.averages.values())).model
        lengths = tuple(self.averages)
        return described(self, model=model, sigma_rels=lengths, updates=self.updates)

    @override
    def by_prefix(self) -> Mapping[str, EMA]:
        return {f"{_name(s)}.": average for s, average in self.averages.items()}

    @property
    def updates(self) -> int:
        """The number of updates so far."""
        return next(iter(self.averages.values())).updates

    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's weights; call after each optimizer step.

        Raises:
            ValueError: if the model's tensors differ in shape from the averaged ones.
        """
        check_part(model, nn.Module, "model")
        for average in self.averages.values():
            average.update(model)

    def save(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
    ) -> list[Path]:
        """Save a snapshot of each average to a folder, each file written atomically.

        Several ranks may save to the same folder. Weights that are sharded are gathered, in the
        process that writes: then all ranks must call this.

        Args:
            folder: the folder, created if it does not exist.
            dtype: the dtype of the saved weights, their own by default; torch.float16 halves
                float32 files.

        Returns:
            The paths of the files, which are named after update and length.

        Raises:
            ValueError: if there has been no update.
        """
        check_floating_dtype(dtype)
        check_count(self.updates, "updates")
        place = Path(checked_path(folder))
        place.mkdir(parents=True, exist_ok=True)
        paths = []
        for sigma_rel, average in self.averages.items():
            parameters = average.model.named_parameters(remove_duplicate=False)
            averaged = [n for n, p in parameters if p.is_floating_point() or p.is_complex()]
            weights = dict(average.model.state_dict())
            weights |= {name: weights[name].to(dtype or weights[name].dtype) for name in averaged}
            content = {
                "format": FORMAT, "version": VERSION, "updates": self.updates,
                "sigma_rel": float(sigma_rel), "averaged": averaged, "model": weights,
            }  # fmt: skip
            paths.append(path := place / f"{self.updates:09d}-{sigma_rel:g}.pt")
            write_whole(path, content, partial(save_torch, path))
        return paths


def _name(sigma_rel: float) -> str:
    """Return the name of an average in the state, where names have no dots: 0_05."""
    return repr(float(sigma_rel)).replace(".", "_")


def power_coefficients(
    snapshots: Sequence[tuple[int, float]], wanted: tuple[int, float]
) -> tuple[Tensor, float]:
    r"""Return the coefficients with which saved averages best approximate another one.

    A least-squares fit of the profiles p_i(s) = (gamma_i + 1) s^gamma_i / t_i^(gamma_i + 1) on
    [0, t_i]:

    .. math::
        A c = b, \quad A_{ij} = \langle p_i, p_j \rangle, \quad b_i = \langle p_i, p \rangle,
        \quad \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)}
        {\gamma_i + \gamma_j + 1} \frac{m^{\gamma_i + \gamma_j + 1}}
        {t_i^{\gamma_i + 1} t_j^{\gamma_j + 1}}, \quad m = \min(t_i, t_j),

    after which c is divided by its sum.

    Args:
        snapshots: (update, sigma_rel) of each saved average, all different.
        wanted: (update, sigma_rel) of the average to approximate.

    Returns:
        The coefficients (n,), and the error of the fitted profile relative to the norm of the
        wanted one.

    Raises:
        ValueError: if two snapshots are equal, an update is < 1 or a sigma_rel is out of range.
        TypeError: if an update is not an integer or a sigma_rel is not a number.

    Source: Karras et al., 2024, arXiv 2312.02696 (appendix C).
    """
    check_sequence(snapshots, "snapshots")
    if not snapshots:
        raise ValueError("snapshots: expected at least one, got none")
    for name, pair in (("wanted", wanted), *(("snapshots", pair) for pair in snapshots)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name}: expected pairs (updates, sigma_rel), got {pair!r:.80}")
    if len(set(snapshots)) < len(snapshots):
        raise ValueError(f"snapshots: expected distinct ones, got {sorted(snapshots)}")
    rows = [*snapshots, wanted]
    for updates, _ in rows:
        check_count(updates, "updates", most=10**100)
    t = torch.tensor([float(updates) for updates, _ in rows], dtype=torch.float64)
    power = torch.tensor([power_exponent(s) + 1 for _, s in rows], dtype=torch.float64)
    both, earlier = power.unsqueeze(1) + power, torch.minimum(t.unsqueeze(1), t)
    share = (earlier / t) ** power  # of the column's profile before the earlier update
    gram = power.unsqueeze(1) * power / (both - 1) * share * share.t() / earlier
    a, b, norm = gram[:-1, :-1], gram[:-1, -1], gram[-1, -1]
    c = torch.linalg.solve(a, b)
    error = float((1 - c @ b / norm).clamp_min(0.0).sqrt())
    return c / c.sum(), error


def reconstruct_ema(
    snapshots: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    sigma_rel: float,
    *,
    updates: int | None = None,
) -> dict[str, Tensor]:
    """Return the weights of a `PowerEMA` of another length, computed from saved snapshots.

    Each file is read twice, one at a time. Buffers are not averaged; they come from the last
    snapshot. If the fit's error exceeds 10%, a warning is logged: save more often, or choose a
    length closer to the saved ones.

    Args:
        snapshots: the folder of `PowerEMA.save`, or its files; those after `updates` are ignored.
        sigma_rel: the length to reconstruct.
        updates: the update to reconstruct it at, by default that of the last snapshot.

    Returns:
        A state dict for `model.load_state_dict`.

    Raises:
        FileNotFoundError: if a file does not exist.
        CheckpointError: if a file is damaged, not a snapshot, or of another model.
        ValueError: if fewer than two snapshots remain, or sigma_rel is out of range.
    """
    if updates is not None:
        check_count(updates, "updates")
    if isinstance(snapshots, Tensor) or not isinstance(snapshots, (str, os.PathLike, Iterable)):
        got = type(snapshots).__name__
        raise TypeError(f"snapshots: expected a folder or paths of files, got {got}")
    if isinstance(snapshots, (str, os.PathLike)):
        snapshots = sorted(Path(snapshots).glob("*.pt"))
    found = {_position(path): path for path in snapshots}
    last = max((at for at, _ in found), default=0) if updates is None else updates
    used = sorted(key for key in found if key[0] <= last)
    if len(used) < 2:
        raise ValueError(
            f"snapshots: expected at least two up to update {last}, got {len(used)} of {len(found)}"
        )
    coefficients, error = power_coefficients(used, (last, sigma_rel))
    if error > 0.1:
        logger.warning("the fit to sigma_rel = %g has an error of %.0f%%", sigma_rel, 100 * error)
    total: dict[str, Tensor] = {}
    layouts: list[dict[str, Any]] = []
    for key, coefficient in zip(used, coefficients.tolist(), strict=True):
        content = _read(found[key])
        weights, averaged = content["model"], content["averaged"]
        layouts.append({n: (n in averaged, getattr(v, "shape", v)) for n, v in weights.items()})
        if layouts[-1] != layouts[0]:
            raise CheckpointError(f"{found[key]}: expected the tensors of {found[used[0]]}, "
                                  "got others")  # fmt: skip
        for name in averaged:
            exact = torch.promote_types(weights[name].dtype, torch.float64)
            part = weights[name].to(exact) * coefficient
            total[name] = total[name].add_(part) if name in total else part
    return {
        name: total[name].to(torch.promote_types(value.dtype, torch.float32))
        if name in total
        else value
        for name, value in weights.items()
    }


def _position(path: str | os.PathLike[str]) -> tuple[int, float]:
    content = _read(path)
    return content["updates"], content["sigma_rel"]


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    expected = "a snapshot written by PowerEMA.save"
    content = read_torch(path, expected=expected)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected {expected}, got a file of another format")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {content.get('version')}")
    wrong = [k for k, kind in _PARTS.items() if not isinstance(content.get(k), kind)]
    if wrong or not set(content["averaged"]) <= set(content["model"]):
        raise CheckpointError(f"{path}: expected {expected}, got one with wrong entries: {wrong}")
    return content
