"""The stable target field: regression on a posterior mean over a reference batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._checks import check_reference, readable
from .._distributed import gather_rows
from .._schedules import exact
from ..interfaces import Perturbed, Prediction, TargetEstimator
from ..models.oracles import softmax_mean

Source: TypeAlias = Literal["inside", "outside", "added"]
# Of centred references (m, D): logits (B, m), where the source's is 0, and which are the source.
Measure: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]

# Up to this dimension differences cost little more than products, and lose no digit.
_FEW = 16


@dataclass(frozen=True)
class StableTarget(TargetEstimator):
    r"""The mean of reference data that could have made the noisy state: a stable target field.

    .. math::
        \hat x_0 = \sum_k w_k x_k, \quad
        w = \mathrm{softmax}_k\!\left(-\|x - \alpha x_k\|^2 / (2 \sigma^2)\right), \quad
        \hat\epsilon = (x - \alpha \hat x_0) / \sigma

    over reference data x_k, n of them. If they are independent draws from the data, and the one
    that made x, the source, is among them, then this is the source's mean given x and the
    reference as a set. Its mean given x is therefore the denoising target's, for every n, and
    its variance is smaller: n = 1 is the denoising target, n = 2 halves its variance where noise
    is large, n = all of the data gives `EmpiricalModel`. Without the source it is biased: for two
    Gaussians in the plane, 16 references and noise of half their deviation, the squared bias is
    .038, where the variance of the denoising target is .100.

    Computed in float64, by differences up to 16 dimensions and by matrix products beyond them, in
    blocks of the reference, so that memory does not grow with n B D. Products round logits by
    about 1e-16 (r alpha / sigma)^2, with r a datum's distance from their mean. No gradient flows
    through it.

    Args:
        source: "inside" where the batch is part of the reference; "added" where it is not, and
            each sample's own source shall join the others, so that both are unbiased; "outside"
            leaves the source out, and is biased.
        gather: whether to put together the references of all processes of torch.distributed, in
            the order of their ranks; each process may have another number of them.

    Raises:
        ValueError: if source is none of the three.

    Source: Xu, Tong and Jaakkola, Stable Target Field for Reduced Variance Score Estimation in
    Diffusion Models, 2023, arXiv 2302.00670.

    >>> from diffusionkit import EpsModel, ScoreMatching, VPSDE
    >>> model = EpsModel(lambda x, noise_label: torch.zeros_like(x), VPSDE())
    >>> objective, data = ScoreMatching(target=StableTarget()), torch.randn(256, 3)
    >>> objective(model, data[:8], reference=data).shape
    torch.Size([8])
    """

    source: Source = "inside"
    gather: bool = False

    def __post_init__(self) -> None:
        """Check the choice of the source."""
        if self.source not in get_args(Source):
            raise ValueError(f"source: expected one of {get_args(Source)}, got {self.source!r}")

    @torch.no_grad()
    def __call__(
        self,
        sample: Perturbed,
        reference: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        reference_class_labels: Tensor | None = None,
        **cond: Any,
    ) -> Prediction:
        """Return the target for noisy data, given reference data (n, *D).

        Args:
            sample: the noisy data.
            reference: the reference data (n, *D).
            class_labels: the class labels (B,) of the batch; only references of the same class
                count.
                Labels that are dropped, for guidance without a classifier, have to be dropped
                in both, or after the target: then they are classes as others, or none.
            reference_class_labels: the classes (n,) of the reference data.
            cond: no other condition is known here.

        Raises:
            ValueError: if the reference is missing or empty, not finite, or of another shape,
                dtype or device than the data; if only one of the two labels is given, or a class
                has no reference; if the source is not in the reference although declared so.
                Values are read on the CPU only; elsewhere a sample whose class has no reference
                keeps its denoising target.
            TypeError: if there are other conditions, for the references would have to meet them.
        """
        if reference is None:
            raise ValueError(
                "StableTarget: expected reference data, got none; hand them to the objective: "
                "objective(model, batch[:64], reference=batch)"
            )
        if cond:
            raise TypeError(
                f"StableTarget: expected no condition but class_labels, got {', '.join(cond)}: "
                "references made under other conditions would give a wrong target"
            )
        check_reference(reference, sample.x0)
        _check_labels(class_labels, reference_class_labels, sample.x0, reference)
        if self.gather:
            reference = gather_rows(reference)
            reference_class_labels = (
                None if reference_class_labels is None else gather_rows(reference_class_labels)
            )
        offset = self._offset(sample, reference, class_labels, reference_class_labels)
        ratio = _ratio(sample).view(-1, *(1,) * (sample.x.ndim - 1))
        # Not from x, where small noise has lost its digits.
        x0, eps = exact(sample.x0) + offset, exact(sample.eps) - ratio * offset
        dtype = sample.x.dtype
        return Prediction(sample.x, x0.to(dtype), eps.to(dtype), sample.alpha, sample.sigma)

    def _offset(
        self,
        sample: Perturbed,
        reference: Tensor,
        class_labels: Tensor | None,
        reference_class_labels: Tensor | None,
    ) -> Tensor:
        """Return the weighted mean's difference from the source, (B, *D)."""
        batch, n = len(sample.x0), len(reference)
        anchor, noise = (exact(x).reshape(batch, -1) for x in (sample.x0, sample.eps))
        reference = reference.reshape(n, -1)
        allowed = reference.new_ones((1, n), dtype=torch.bool)
        if class_labels is not None and reference_class_labels is not None:
            allowed = class_labels.unsqueeze(1) == reference_class_labels
            _check_classes(class_labels, allowed)
        # From the references' mean, so that a large common value costs no digits.
        centre = exact(reference.mean(0))
        own, d = anchor - centre, anchor.shape[1]
        measure = (_differences if d <= _FEW else _products)(own, noise, _ratio(sample))
        rows = max(1, min(1024, 2**19 // d))  # a block stays in the cache
        found = torch.zeros_like(own[:, 0], dtype=torch.bool)

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal found
            logit = torch.zeros_like(own[:, :1])
            if self.source != "added":
                logit = logit.masked_fill(allowed.any(1, keepdim=True), -torch.inf)
            yield logit, own.unsqueeze(1)
            blocks = torch.split(reference, rows), torch.split(allowed, rows, 1)
            for block, mask in zip(*blocks, strict=True):
                values = block - centre
                logits, same = measure(values)
                found = found | (same & mask).any(1)
                yield logits.masked_fill(~mask, -torch.inf), values

        mean = softmax_mean(parts())
        if self.source == "inside" and readable(found) and not bool(found.all()):
            lost = torch.nonzero(~found).flatten().tolist()
            labels = "" if class_labels is None else ", with the same class labels"
            raise ValueError(
                f"reference: expected the batch inside it{labels}, "
                f"got {len(lost)} of {batch} that are not, first {lost[:4]}; without them "
                'the target is biased: add them, or say StableTarget(source="added")'
            )
        return (mean - own).view(sample.x0.shape)


def _ratio(sample: Perturbed) -> Tensor:
    # Bounded, so that without noise the source alone counts.
    return (exact(sample.alpha) / exact(sample.sigma)).clamp_max(1e8)


def _differences(own: Tensor, noise: Tensor, ratio: Tensor) -> Measure:
    """Sum over the dimensions one by one: near the source nothing is rounded."""
    ratio, columns = ratio.unsqueeze(1), (torch.split(own, 1, 1), torch.split(noise, 1, 1))

    def measure(values: Tensor) -> tuple[Tensor, Tensor]:
        logits, same = values.new_zeros(()), torch.ones_like(values[:, 0], dtype=torch.bool)
        for value, source, eps in zip(values.unbind(1), *columns, strict=True):
            u = ratio * (value - source)
            logits = logits + u * (eps - 0.5 * u)
            same = same & (u == 0)
        return logits, same

    return measure


def _products(own: Tensor, noise: Tensor, ratio: Tensor) -> Measure:
    """Expand the square, so that all sums are matrix products."""
    ratio = ratio.unsqueeze(1)
    query = ratio * (noise + ratio * own)
    constant = (query * own - 0.5 * (ratio * own).square()).sum(1, keepdim=True)
    # Of unlike rows the projections on incommensurable numbers are unlike.
    probe = torch.arange(1, own.shape[1] + 1, device=own.device, dtype=own.dtype).sin()
    queries, projection = torch.cat([query, probe.unsqueeze(0)]), (own @ probe).unsqueeze(1)
    rounding = 1e-12 * own.norm(dim=1, keepdim=True) * probe.norm()

    def measure(values: Tensor) -> tuple[Tensor, Tensor]:
        products = queries @ values.T
        squares = torch.linalg.vector_norm(values, dim=1).square()
        logits = products[:-1] - 0.5 * ratio.square() * squares - constant
        return logits, (products[-1] - projection).abs() <= rounding

    return measure


def _check_labels(
    class_labels: Tensor | None,
    reference_class_labels: Tensor | None,
    x0: Tensor,
    reference: Tensor,
) -> None:
    if (class_labels is None) != (reference_class_labels is None):
        given, missing = ("class_labels", "reference_class_labels")[
            :: 1 if reference_class_labels is None else -1
        ]
        raise ValueError(
            f"{missing}: expected as {given} are given, got none: references of all classes "
            "would give a model that is told the class a wrong target"
        )
    for name, classes, data in (
        ("class_labels", class_labels, x0),
        ("reference_class_labels", reference_class_labels, reference),
    ):
        if classes is not None and (classes.shape, classes.device) != (data.shape[:1], data.device):
            raise ValueError(f"{name}: expected shape ({len(data)},) on {data.device}, "
                             f"got {tuple(classes.shape)} on {classes.device}")  # fmt: skip


def _check_classes(class_labels: Tensor, allowed: Tensor) -> None:
    if readable(class_labels) and readable(allowed):
        absent = sorted(set(class_labels[~allowed.any(1)].tolist()))
        if absent:
            raise ValueError(
                f"reference_labels: expected each class of the batch, got no reference of {absent}"
            )
