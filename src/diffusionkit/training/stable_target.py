"""The stable target field: regression on the posterior mean over a reference batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_choice, check_flag, check_reference, readable
from .._precision import at_least_float32
from .._schedules import exact
from ..distributed._group import gather_rows
from ..interfaces import Perturbed, Prediction, TargetEstimator
from ..models.oracles import softmax_mean

Source: TypeAlias = Literal["inside", "outside", "added"]
# A block of references (m, D) minus their mean, its logits (B, m), which are 0 at the source, and
# which of them are the source (B, m).
_Scored: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Up to this dimension differences cost little more than products, and lose no digits.
_FEW = 16


@dataclass(frozen=True)
class StableTarget(TargetEstimator):
    r"""The posterior mean of the data over a reference batch: a stable target field.

    .. math::
        \hat x_0 = \sum_k w_k x_k, \quad
        w = \mathrm{softmax}_k\!\left(-\|x - \alpha x_k\|^2 / (2 \sigma^2)\right), \quad
        \hat\epsilon = (x - \alpha \hat x_0) / \sigma

    over n reference data x_k. If they are independent draws from the data distribution and
    include the source, the x_k that x was made from, this is the mean of the source given x and
    the reference as a set. It is then unbiased for every n: its mean given x is that of the
    denoising target, with less variance. n = 1 is the denoising target, n = 2 halves its variance
    at high noise, and the whole data set gives `EmpiricalModel`. Without the source it is biased:
    for two Gaussians in the plane, 16 references and noise of half their standard deviation, the
    squared bias is .038, and the variance of the denoising target .100.

    Computed in float64, from differences up to 16 dimensions and from matrix products above, in
    blocks of references, so that memory does not grow with n B D. Products round the logits by
    about 1e-16 (r alpha / sigma)^2, r the distance of a datum from the mean. No gradient flows
    through the target.

    Args:
        source: "inside" if the batch is part of the reference; "added" if it is not, to add each
            sample's source to its references; "outside" to leave the source out. The first two
            are unbiased, the last is biased.
        gather: whether to use the references of all torch.distributed processes, ordered by rank;
            their numbers may differ.

    Raises:
        ValueError: if source is none of the three.

    Source: Xu, Tong and Jaakkola, Stable Target Field for Reduced Variance Score Estimation in
    Diffusion Models, 2023, arXiv 2302.00670.

    >>> import torch
    >>> from diffusionkit import VPSDE, EpsModel, ScoreMatching, StableTarget
    >>> model = EpsModel(lambda x, noise_label: 0 * x, VPSDE())
    >>> objective = ScoreMatching(target=StableTarget())
    >>> data = torch.randn(256, 3)
    >>> objective(model, data[:8], reference=data).shape
    torch.Size([8])
    """

    source: Source = "inside"
    gather: bool = False

    def __post_init__(self) -> None:
        check_choice("source", self.source, get_args(Source))
        check_flag(self.gather, "gather")

    @override
    @torch.no_grad()
    def __call__(
        self,
        sample: Perturbed,
        reference: Tensor | None = None,
        /,
        *,
        class_labels: Tensor | None = None,
        reference_class_labels: Tensor | None = None,
        **cond: Any,
    ) -> Prediction:
        """Return the target for noisy data, given reference data (n, *D).

        Args:
            sample: the noisy data.
            reference: the reference data (n, *D).
            class_labels: the class labels (B,) of the batch; each sample uses only the references
                of its class. For classifier-free guidance, drop class labels either in batch and
                reference alike, which makes the null label a class, or after the target.
            reference_class_labels: the class labels (n,) of the reference data.
            cond: must be empty; no other condition is supported.

        Raises:
            ValueError: if the reference is missing or empty, not finite, or differs from the data
                in shape, dtype or device; if only one of the two class labels is given, or a class
                has no reference; if source is "inside" and a sample is not in the reference.
                Values are read on the CPU only; elsewhere a sample whose class has no reference
                keeps its denoising target.
            TypeError: if there are other conditions, since the references may not satisfy them.
        """
        if reference is None:
            raise ValueError(
                "reference: expected reference data (n, *D), got none; pass them to the objective: "
                "objective(model, batch[:64], reference=batch)"
            )
        if cond:
            raise TypeError(
                f"cond: expected no condition but class_labels, got {', '.join(cond)}; "
                "references of other conditions would give a wrong target"
            )
        if isinstance(reference, Tensor):
            reference = at_least_float32(reference)  # as the data are
        check_reference(reference, at_least_float32(sample.x0))
        _check_labels(class_labels, reference_class_labels, sample.x0, reference)
        if self.gather:
            reference = gather_rows(reference)
            reference_class_labels = (
                None if reference_class_labels is None else gather_rows(reference_class_labels)
            )
        offset = self._offset(sample, reference, class_labels, reference_class_labels)
        ratio = _ratio(sample).view(-1, *(1,) * (sample.x.ndim - 1))
        # Not from x, in which low noise has been rounded off.
        x0, eps = exact(sample.x0) + offset, exact(sample.eps) - ratio * offset
        dtype = at_least_float32(sample.x).dtype
        return Prediction(sample.x, x0.to(dtype), eps.to(dtype), sample.alpha, sample.sigma)

    def _offset(
        self,
        sample: Perturbed,
        reference: Tensor,
        class_labels: Tensor | None,
        reference_class_labels: Tensor | None,
    ) -> Tensor:
        """Return the weighted mean of the references minus the source, (B, *D)."""
        batch, n = len(sample.x0), len(reference)
        anchor, noise = (exact(x).reshape(batch, -1) for x in (sample.x0, sample.eps))
        reference = reference.reshape(n, -1)
        allowed = None  # all of them
        if class_labels is not None and reference_class_labels is not None:
            allowed = class_labels.unsqueeze(1) == reference_class_labels
            _check_classes(class_labels, allowed)
        # Relative to the references' mean, so that a large common value costs no digits.
        center = exact(reference.mean(0))
        own, d = anchor - center, anchor.shape[1]
        # What is computed of a block stays in the cache: numbers of all pairs, or the block itself.
        rows = max(1, min(1024, 2**16 // batch if d <= _FEW else 2**19 // d))
        blocks = (block - center for block in torch.split(reference, rows))
        check = self.source == "inside" and readable(own)
        if d <= _FEW:
            scored = _by_differences(own, noise, _ratio(sample), blocks, check)
        else:
            scored = _by_products(own, noise, _ratio(sample), blocks)
        masks: Iterable[Tensor | None] = (
            repeat(None, -(-n // rows)) if allowed is None else torch.split(allowed, rows, 1)
        )
        found: list[Tensor] = []  # for each block, which samples have their source in it, (B,)

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            logit = torch.zeros_like(own[:, :1])  # of the source, added to the references
            if self.source != "added":
                # The source alone where its class has no reference.
                others = torch.ones_like(logit).bool() if allowed is None else allowed
                logit = logit.masked_fill(others.any(1, keepdim=True), -torch.inf)
            yield logit, own.unsqueeze(1)
            for mask, (values, logits, is_source) in zip(masks, scored, strict=True):
                if mask is not None:
                    logits = logits.masked_fill(~mask, -torch.inf)
                if check:
                    found.append((is_source if mask is None else is_source & mask).any(1))
                yield logits, values

        mean = softmax_mean(parts())
        if check:
            lost = torch.nonzero(~torch.stack(found).any(0)).flatten().tolist()
            if lost:
                labels = "" if class_labels is None else " with its class label"
                raise ValueError(
                    f"reference: expected every sample of the batch{labels}, "
                    f"got {len(lost)} of {batch} missing, first {lost[:4]}; without them the "
                    'target is biased: add them, or use StableTarget(source="added")'
                )
        return (mean - own).view(sample.x0.shape)


def _ratio(sample: Perturbed) -> Tensor:
    # Bounded, so that without noise the weight is all on the source.
    return (exact(sample.alpha) / exact(sample.sigma)).clamp_max(1e8)


def _by_differences(
    own: Tensor, noise: Tensor, ratio: Tensor, blocks: Iterable[Tensor], check: bool
) -> Iterator[_Scored]:
    """Score references dimension by dimension, without rounding near the source.

    Sources are found only with `check`.
    """
    ratio, columns = ratio.unsqueeze(1), (torch.split(own, 1, 1), torch.split(noise, 1, 1))
    for values in blocks:
        logits = values.new_zeros(())
        is_source = torch.ones_like(values[:, 0], dtype=torch.bool)
        for value, source, eps in zip(values.unbind(1), *columns, strict=True):
            u = ratio * (value - source)
            logits = torch.addcmul(logits, u, torch.add(eps, u, alpha=-0.5))
            if check:
                is_source = is_source & (value == source)
        yield values, logits, is_source


def _by_products(
    own: Tensor, noise: Tensor, ratio: Tensor, blocks: Iterable[Tensor]
) -> Iterator[_Scored]:
    """Score references by expanding the square, so that all sums are matrix products."""
    ratio = ratio.unsqueeze(1)
    query = ratio * (noise + ratio * own)
    constant = (query * own - 0.5 * (ratio * own).square()).sum(1, keepdim=True)
    # A reference is the source if both have the same projection on one generic direction.
    direction = torch.arange(1, own.shape[1] + 1, device=own.device, dtype=own.dtype).sin()
    queries, projection = torch.cat([query, direction.unsqueeze(0)]), (own @ direction).unsqueeze(1)
    tolerance = 1e-12 * own.norm(dim=1, keepdim=True) * direction.norm()
    for values in blocks:
        products = queries @ values.T
        squares = torch.linalg.vector_norm(values, dim=1).square()
        logits = products[:-1] - 0.5 * ratio.square() * squares - constant
        yield values, logits, (products[-1] - projection).abs() <= tolerance


def _check_labels(
    class_labels: Tensor | None,
    reference_class_labels: Tensor | None,
    x0: Tensor,
    reference: Tensor,
) -> None:
    if (class_labels is None) != (reference_class_labels is None):
        names = "class_labels", "reference_class_labels"
        given, missing = names if reference_class_labels is None else names[::-1]
        raise ValueError(
            f"{missing}: expected together with {given}, got None; references of all classes "
            "would give a class-conditional model a wrong target"
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
            raise ValueError("reference_class_labels: expected every class of the batch, "
                             f"got no reference of {absent}")  # fmt: skip
