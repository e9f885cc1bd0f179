"""The stable target field: regression on the posterior mean over a reference batch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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

# Up to this dimension differences cost little more than products, and lose fewer digits.
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
    blocks of references, so that memory does not grow with n B D. Differences round the logits by
    about 1e-16 r alpha / sigma, products by 1e-16 (r alpha / sigma)^2, r the distance of a datum
    from the mean. No gradient flows through the target.

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
        x0 = at_least_float32(sample.x0)
        if isinstance(reference, Tensor):
            reference = at_least_float32(reference)  # as the data are
        check_reference(reference, x0)
        if class_labels is not None or reference_class_labels is not None:
            _check_labels(class_labels, reference_class_labels, sample.x0, reference)
        if self.gather:
            reference = gather_rows(reference)
            reference_class_labels = (
                None if reference_class_labels is None else gather_rows(reference_class_labels)
            )
        x0, eps, reference = _rows(x0), _rows(at_least_float32(sample.eps)), _rows(reference)
        allowed = None  # all of them
        if class_labels is not None and reference_class_labels is not None:
            allowed = class_labels.unsqueeze(1) == reference_class_labels
            _check_classes(class_labels, allowed)
        if self.source == "inside" and readable(x0):
            _check_inside(x0, reference, class_labels, reference_class_labels)
        source, noise = exact(x0), exact(eps)
        # Bounded, so that without noise the weight is all on the source, and finite without signal.
        ratio = (exact(sample.alpha) / exact(sample.sigma)).clamp(1e-16, 1e8).unsqueeze(1)
        offset = self._offset(source, noise, ratio, reference, allowed)
        # Not from x, in which low noise has been rounded off.
        x0, eps = source + offset, torch.addcmul(noise, ratio, offset, value=-1)
        dtype, shape = at_least_float32(sample.x).dtype, sample.x0.shape
        x0, eps = x0.to(dtype=dtype), eps.to(dtype=dtype)
        if len(shape) != 2:
            x0, eps = x0.view(shape), eps.view(shape)
        return Prediction(sample.x, x0, eps, sample.alpha, sample.sigma)

    def _offset(
        self,
        source: Tensor,
        noise: Tensor,
        ratio: Tensor,
        reference: Tensor,
        allowed: Tensor | None,
    ) -> Tensor:
        """Return the weighted mean of the references (n, D) minus the source, (B, D)."""
        batch, d = source.shape
        # Relative to a point among the references, so that a large common value costs no digits.
        center = exact(reference[0] if d <= _FEW else reference.mean(0))
        own = source - center
        # What is computed of a block stays in the cache: numbers of all pairs, or the block itself.
        rows = max(1, min(1024, 2**16 // batch if d <= _FEW else 2**19 // d))
        score = _by_differences if d <= _FEW else _by_products
        scored = score(own, noise, ratio, center, _blocks(reference, rows))
        if self.source != "added" and allowed is None:
            return softmax_mean(scored) - own

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            # Of the source. Products leave out what all logits of a sample have in common.
            logit = (
                noise.square().sum(1, keepdim=True) * -0.5
                if d <= _FEW
                else torch.zeros_like(own[:, :1])
            )
            if self.source != "added" and allowed is not None:
                # The source alone where its class has no reference.
                logit = logit.masked_fill(allowed.any(1, keepdim=True), -torch.inf)
            yield logit, own.unsqueeze(1)
            if allowed is None:
                yield from scored
            else:
                masks = torch.split(allowed, rows, 1)
                for mask, (logits, values) in zip(masks, scored, strict=True):
                    yield logits.masked_fill(~mask, -torch.inf), values

        return softmax_mean(parts()) - own


def _rows(x: Tensor) -> Tensor:
    """Return data (n, *D) as rows (n, d)."""
    return x if x.ndim == 2 else x.reshape(len(x), -1)


def _blocks(x: Tensor, rows: int) -> Sequence[Tensor]:
    """Return the blocks of some rows of a tensor: `torch.split`, which takes its time, or all."""
    return torch.split(x, rows) if len(x) > rows else (x,)


def _by_differences(
    own: Tensor, noise: Tensor, ratio: Tensor, center: Tensor, blocks: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score references by their squared distances, dimension by dimension."""
    columns = torch.addcdiv(own, noise, ratio).T.unsqueeze(2).unbind()  # x / alpha
    curvature = ratio.square() * -0.5
    for block in blocks:
        values = (exact(block) - center).T.contiguous()
        logits: Tensor | None = None
        for value, column in zip(values.unbind(), columns, strict=True):
            difference = value - column
            if logits is None:
                logits = difference.square_()
            else:
                logits.addcmul_(difference, difference)
        if logits is not None:  # D >= 1
            yield logits.mul_(curvature), values.T


def _by_products(
    own: Tensor, noise: Tensor, ratio: Tensor, center: Tensor, blocks: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score references by expanding the square, so that all sums are matrix products."""
    query = ratio * (noise + ratio * own)
    constant = (query * own - 0.5 * (ratio * own).square()).sum(1, keepdim=True)
    curvature = -0.5 * ratio.square()
    for block in blocks:
        values = block - center
        squares = torch.linalg.vector_norm(values, dim=1).square()
        logits = torch.addcmul(-constant, curvature, squares).addmm_(query, values.T)
        yield logits, values


def _check_inside(
    source: Tensor,
    reference: Tensor,
    class_labels: Tensor | None,
    reference_class_labels: Tensor | None,
) -> None:
    """Raise unless every source (B, D), with its class label, is among the references (n, D)."""
    first = slice(len(source))
    if torch.equal(reference[first], source) and (
        class_labels is None
        or reference_class_labels is None
        or torch.equal(reference_class_labels[first], class_labels)
    ):
        return  # as in objective(model, batch[:64], reference=batch)
    own, known = _keys(source, class_labels), _keys(reference, reference_class_labels)
    known = known.sort().values
    nearest = known[torch.searchsorted(known, own).clamp_max_(len(known) - 1)]
    if torch.equal(nearest, own):
        return
    lost = torch.nonzero(nearest != own).flatten().tolist()
    labels = "" if class_labels is None else " with its class label"
    raise ValueError(
        f"reference: expected every sample of the batch{labels}, "
        f"got {len(lost)} of {len(own)} missing, first {lost[:4]}; without them the "
        'target is biased: add them, or use StableTarget(source="added")'
    )


def _keys(rows: Tensor, class_labels: Tensor | None) -> Tensor:
    """Return hashes of rows (n, D) and their class labels, (n,): equal for equal rows.

    Looking one up among n is cheaper than comparing all pairs.
    """
    d = rows.shape[1]
    word = torch.int64 if d * rows.dtype.itemsize % 8 == 0 else torch.int32
    parts = []
    for block in _blocks(rows, max(1, 2**19 // d)):
        words = (block + 0.0).contiguous().view(word)  # -0 is 0
        parts.append((words * _factors(words.shape[1], rows.device)).sum(1))
    keys = torch.cat(parts) if len(parts) > 1 else parts[0]
    return keys if class_labels is None else 31 * keys + class_labels.long()


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    """Return random odd integers."""
    draw = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
    return (2 * draw + 1).to(device)


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
