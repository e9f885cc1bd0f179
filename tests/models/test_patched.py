"""Large fields from a model of patches: exact where the receptive field allows, and averaged."""

import itertools
import math

import pytest
import torch
from support import seeded
from support.gaussian_fields import GaussianFieldModel
from torch import nn

from diffusionkit import (
    DDIM,
    EDMSDE,
    NELBO,
    VESDE,
    VPSDE,
    Ancestral,
    ClassifierFreeGuidance,
    DPMSolver2M,
    EDMModel,
    EpsModel,
    ExactDivergence,
    FlowMatchingSDE,
    GaussianMixtureModel,
    GradientGuidance,
    Heun,
    Inpainting,
    LogSNRGrid,
    ODELikelihood,
    PatchedModel,
    PCSampler,
    Prediction,
    ProbabilityFlow,
    RawScoreModel,
    ScaledScoreModel,
    ScheduleTransformedModel,
    ScoreMatching,
    ScoreModel,
    UniformGrid,
    VelocityModel,
    VModel,
    X0Model,
)
from diffusionkit.models._windows import axis_windows, starts
from diffusionkit.testing import check_score_model

REACH = 4  # of the network's receptive field
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODELS = {
    "eps": EpsModel,
    "x0": X0Model,
    "v": VModel,
    "velocity": VelocityModel,
    "score": RawScoreModel,
    "scaled score": ScaledScoreModel,
    "EDM": EDMModel,
}


class Convolutions(nn.Module):
    """Two convolutions of width 5, which reach four points far, scaled by the noise label."""

    def __init__(self, dims: int, *, channels: int = 2, periodic: bool = False) -> None:
        super().__init__()
        torch.manual_seed(dims)
        mode = "circular" if periodic else "zeros"
        make = CONVOLUTIONS[dims]
        self.first = make(channels, 3, 5, padding=2, padding_mode=mode)
        self.last = make(3, 2, 5, padding=2, padding_mode=mode)
        self.rows: list[int] = []

    def forward(self, x, noise_label):
        self.rows.append(len(x))
        factor = torch.tanh(1 + noise_label.abs()).view(-1, *(1,) * (x.ndim - 1))
        return self.last(torch.tanh(self.first(x)) * factor.to(x))


def state(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(), dtype=torch.float64).to(dtype)


def same(patched, model, x, t, tolerance, **cond) -> None:
    """Every view of two predictions is equal, relative to the largest number."""
    with torch.no_grad():
        found, expected = patched.predict(x, t, **cond), model.predict(x, t, **cond)
    for name in ("x0", "eps", "score", "v"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), name
    a, b = (p.combine(x=0.3, x0=-1.7) for p in (found, expected))
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


SHAPES = {1: ((50,), 20, 10), 2: ((23, 30), (12, 19), (8, 9)), 3: ((13, 10, 10), (11, 10, 10), 8)}


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("dims", SHAPES)
def test_equal_to_the_whole_field_where_the_receptive_field_allows(sde, dims, periodic) -> None:
    size, patch, overlap = SHAPES[dims]
    for kind, parameterization in MODELS.items():
        if dims == 3 and (kind != "eps" or not isinstance(sde, VESDE)):
            continue
        model = parameterization(Convolutions(dims, periodic=periodic), sde).double()
        for blend in ("cosine", "uniform") if kind == "eps" else ("cosine",):
            # Circular convolutions need no windows across the edges of an axis that is one window.
            around = (True, False, False) if periodic and dims == 3 else periodic
            patched = PatchedModel(
                model, patch, overlap, margin=REACH, blend=blend, periodic=around, batch=7
            )
            t = torch.tensor([0.1, 0.9], dtype=torch.float64) * sde.T
            same(patched, model, state(2, 2, *size), t, 1e-12)
            same(patched.float(), model.float(), state(2, 2, *size, dtype=torch.float32), t, 1e-5)
            model.double()


def test_less_of_a_margin_is_not_exact() -> None:
    model = EpsModel(Convolutions(1), VPSDE()).double()
    x, t = state(1, 2, 50), torch.tensor([0.5], dtype=torch.float64)
    patched = PatchedModel(model, 20, 10, margin=REACH - 1)
    assert float((patched(x, t) - model(x, t)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("predictor", [DDIM(), Ancestral(), Heun(), DPMSolver2M()], ids=repr)
def test_samplers_follow_the_whole_field(sde, predictor, shift) -> None:
    model = VelocityModel(Convolutions(1), sde).double()  # known at alpha = 0
    patched = PatchedModel(model, 20, 10, margin=REACH, shift=shift)
    grid = LogSNRGrid(t_end=0.05 * sde.T)
    found, expected = (
        PCSampler(m, predictor, steps=6, grid=grid)(state(2, 2, 41), generator=seeded())
        for m in (patched, model)
    )
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_windows_cover_a_field() -> None:
    assert starts(10, 4, 3, periodic=False, offset=0) == [0, 3, 6]
    assert starts(11, 4, 3, periodic=False, offset=0) == [0, 3, 6, 7]
    assert starts(11, 4, 3, periodic=False, offset=2) == [0, 2, 5, 7]
    assert starts(4, 4, 3, periodic=False, offset=2) == [0]
    assert starts(10, 4, 3, periodic=True, offset=0) == [0, 3, 6, 9]
    assert starts(10, 4, 3, periodic=True, offset=2) == [2, 5, 8, 1]


def weights(size, overlap, margin, smooth, periodic=False, offset=0):
    found = axis_windows(size, 6, overlap, margin, smooth=smooth, periodic=periodic,
                         offset=offset, like=torch.zeros(1, dtype=torch.float64))  # fmt: skip
    return found.starts, found.weights


def test_weights_of_two_windows() -> None:
    first, w = weights(8, 4, 1, smooth=True)
    assert first == [0, 2]
    low, high = math.sin(math.pi / 8) ** 2, math.cos(math.pi / 8) ** 2
    expected = [[1, 1, 1, high, low, 0], [0, low, high, 1, 1, 1]]
    assert torch.allclose(w, torch.tensor(expected, dtype=torch.float64), atol=1e-15)
    _, w = weights(8, 4, 1, smooth=False)
    assert w.tolist() == [[1, 1, 1, 0.5, 0.5, 0], [0, 0.5, 0.5, 1, 1, 1]]
    _, w = weights(8, 4, 2, smooth=True)
    assert w.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("periodic", [False, True])
def test_weights_sum_to_one(periodic) -> None:
    for size, overlap, smooth in itertools.product((6, 7, 13, 20), range(6), (False, True)):
        for margin, offset in itertools.product(range(overlap // 2 + 1), range(6 - overlap)):
            first, w = weights(size, overlap, margin, smooth, periodic, offset)
            total = torch.zeros(size, dtype=torch.float64)
            for start, row in zip(first, w, strict=True):
                for i, value in enumerate(row):
                    total[(start + i) % size] += value
            assert torch.allclose(total, torch.ones_like(total), atol=1e-14)
            assert bool((w >= 0).all())


class MeanOfWindow(ScoreModel):
    """Predicts data of its own and noise of its own: nothing cancels."""

    def __init__(self, sde) -> None:
        super().__init__()
        self.sde = sde

    def predict(self, x, t, /, **cond):
        kernel = self.sde.perturbation_kernel(x, t)
        spread = torch.zeros_like(x)
        x0, eps = spread + x.mean((2, 3), keepdim=True), spread + x.amax((2, 3), keepdim=True)
        return Prediction(x, x0, eps, *kernel)


def test_average_of_data_and_noise() -> None:
    x, t = state(2, 1, 5, 4), torch.tensor([0.2, 0.7], dtype=torch.float64)
    found = PatchedModel(MeanOfWindow(VPSDE()), (3, 4), (1, 0), blend="uniform").predict(x, t)
    top, bottom = x[:, :, :3].mean((2, 3)), x[:, :, 2:].mean((2, 3))
    assert torch.allclose(found.x0[:, :, 0, 0], top)
    assert torch.allclose(found.x0[:, :, 2, 1], (top + bottom) / 2)
    assert torch.allclose(found.x0[:, :, 4, 3], bottom)
    top, bottom = x[:, :, :3].amax((2, 3)), x[:, :, 2:].amax((2, 3))
    assert torch.allclose(found.eps[:, :, 2, 1], (top + bottom) / 2)


def test_learned_variances_are_averaged() -> None:
    for variance, name in (("learned", "log_var"), ("learned_range", "log_var_fraction")):

        def network(x, noise_label):
            return torch.cat([x, torch.zeros_like(x) + x.mean(2, keepdim=True)], 1)

        model = EpsModel(network, VPSDE(), variance=variance)
        x, t = state(1, 1, 5), torch.tensor([0.2], dtype=torch.float64)
        patched = PatchedModel(model, 3, 1, blend="uniform")
        assert patched.variance == variance
        value = getattr(patched.predict(x, t), name)[0, 0]
        means = x[0, 0, :3].mean(), x[0, 0, 2:].mean()
        means = [m if variance == "learned" else (m + 1) / 2 for m in means]
        middle = (means[0] + means[1]) / 2
        assert torch.allclose(value, torch.stack([means[0]] * 2 + [middle] + [means[1]] * 2))


def test_chunks_make_no_difference_and_bound_the_batch() -> None:
    network = Convolutions(2)
    model = EpsModel(network, VPSDE()).double()
    x, t = state(3, 2, 20, 31), torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    results = []
    for batch in (1, 5, 1000):
        network.rows.clear()
        results.append(PatchedModel(model, 8, 4, batch=batch)(x, t))
        assert sum(network.rows) == 3 * 4 * 7
        assert max(network.rows) <= batch
    for result in results[1:]:
        assert torch.allclose(result, results[0], rtol=1e-12, atol=1e-12)


def test_all_windows_are_one_evaluation() -> None:
    model = EpsModel(Convolutions(1), VPSDE())
    sampler = PCSampler(PatchedModel(model, 8, 4, batch=1), DDIM(), steps=5)
    sampler((1, 2, 40))
    assert sampler.nfe == 6
    sampler = PCSampler(
        PatchedModel(ClassifierFreeGuidance(conditional(), 2.0, null={"class_labels": 0}), 8, 4),
        DDIM(), steps=5,
    )  # fmt: skip
    sampler((1, 2, 40), class_labels=torch.tensor([1]))
    assert sampler.nfe == 12


def conditional():
    def network(x, noise_label, class_labels):
        return x * class_labels.view(-1, 1, 1)

    return EpsModel(network, VPSDE())


@pytest.mark.slow  # tracing takes seconds
def test_compiled() -> None:
    patched = PatchedModel(EpsModel(lambda x, noise_label: x.sin(), VPSDE()), 8, 4, batch=3)
    x, t = state(2, 1, 21), torch.tensor([0.2, 0.7], dtype=torch.float64)
    compiled = torch.compile(lambda x, t: patched(x, t), backend="eager")
    assert torch.allclose(compiled(x, t), patched(x, t), rtol=1e-12, atol=1e-12)


def test_conditions_of_samples_and_of_points() -> None:
    def network(x, noise_label, class_labels, field, whole, vector):
        scale = class_labels * whole.sum((1, 2)) * vector.sum()
        return scale.view(-1, 1, 1) * field[:, :1] * x

    model = EpsModel(network, VPSDE())
    x, t = state(2, 1, 30), torch.tensor([0.2, 0.7], dtype=torch.float64)
    cond = {"class_labels": torch.tensor([1, 3]), "field": state(2, 3, 30),
            "whole": state(2, 3, 7), "vector": state(5)}  # fmt: skip
    same(PatchedModel(model, 8, 3, batch=4), model, x, t, 1e-12, **cond)
    one = {"class_labels": torch.tensor(2), "field": state(1, 3, 30),
           "whole": state(1, 3, 7), "vector": state(5)}  # fmt: skip
    same(PatchedModel(model, 8, 3, batch=4), model, x, t, 1e-12, **one)


def test_positions_are_those_of_the_field() -> None:
    def network(x, noise_label, positions):
        return torch.cat([positions, 0 * x], 1)[:, : x.shape[1]]

    model = EpsModel(network, VPSDE())
    x, t = state(2, 2, 10, 7), torch.tensor([0.2, 0.7], dtype=torch.float64)
    for shift, periodic in itertools.product((False, True), repeat=2):
        options = {"shift": shift, "periodic": periodic, "positions": True, "margin": 0}
        eps = PatchedModel(model, (6, 5), (3, 0), **options).predict(x, t).eps
        for i, j in itertools.product(range(10), range(7)):
            expected = torch.tensor([-0.9 + 0.2 * i, -6 / 7 + 2 / 7 * j], dtype=torch.float64)
            assert torch.allclose(eps[:, :, i, j], expected.expand(2, 2)), (i, j)
    with pytest.raises(ValueError, match="positions: expected no condition"):
        PatchedModel(model, 6, 2, positions=True)(x, t, positions=x)


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_those_of_the_whole_field(again) -> None:
    def log_likelihood(x0):
        return -((x0[:, :, ::3] - 0.5) ** 2).flatten(1).sum(1)

    network = Convolutions(2)
    model = EpsModel(network, VPSDE()).double()
    patched = PatchedModel(model, 14, 9, margin=REACH, activation_checkpointing=again, batch=3)
    x, t = state(2, 2, 18, 14), torch.tensor([0.1, 0.4], dtype=torch.float64)
    network.rows.clear()
    same(GradientGuidance(patched, log_likelihood), GradientGuidance(model, log_likelihood),
         x, t, 1e-10)  # fmt: skip
    loss = [ScoreMatching()(m, x, generator=seeded()).mean() for m in (patched, model)]
    assert torch.allclose(*loss)
    grads = [torch.autograd.grad(value, list(network.parameters())) for value in loss]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "sde", [VPSDE(), EDMSDE(), FlowMatchingSDE()], ids=lambda sde: type(sde).__name__
)
def test_likelihood_of_independent_patches(sde) -> None:
    model = GaussianMixtureModel(sde, state(2, 1, 3), [0.5, 0.8])
    x = state(2, 1, 6)
    whole, parts = (
        ODELikelihood(
            m, divergence=ExactDivergence(), method="rk4", options={"step_size": 0.5 * sde.T}
        )(y).log_prob
        for m, y in ((PatchedModel(model, 3, 0), x), (model, torch.cat(x.split(3, 2))))
    )
    assert torch.allclose(whole, parts.view(2, 2).sum(0), rtol=1e-10, atol=1e-10)


def test_flow_and_bound_run() -> None:
    model = EpsModel(Convolutions(1), VPSDE()).double()
    patched = PatchedModel(model, 20, 10, margin=REACH)
    x = state(2, 2, 41)
    bounds = [NELBO(m)(x, generator=seeded()).nats for m in (patched, model)]
    assert torch.allclose(*bounds)
    flows = [ProbabilityFlow(m, method="euler").encode(x) for m in (patched, model)]
    assert torch.allclose(*flows)
    assert check_score_model(PatchedModel(model.float(), 8, 4), (2, 2, 20)).problems == ()


def test_constraints_on_a_large_field() -> None:
    model = EpsModel(Convolutions(2), VPSDE())
    known, mask = state(1, 2, 30, 40, dtype=torch.float32), torch.zeros(1, 1, 30, 40)
    mask[..., 10:20] = 1
    sampler = PCSampler(
        PatchedModel(model, 12, 4), Ancestral(), steps=4, constraint=Inpainting(known, mask)
    )
    samples = sampler((2, 2, 30, 40), generator=seeded())
    assert torch.equal(samples[..., 10:20], known[..., 10:20].expand(2, -1, -1, -1))


def test_another_process() -> None:
    model = EpsModel(Convolutions(1), VPSDE()).double()
    x, t = state(2, 2, 41), torch.tensor([0.5, 3.0], dtype=torch.float64)
    inside = PatchedModel(ScheduleTransformedModel(model, EDMSDE()), 20, 10, margin=REACH)
    outside = ScheduleTransformedModel(PatchedModel(model, 20, 10, margin=REACH), EDMSDE())
    same(inside, outside, x, t, 1e-11)


def test_shifts_are_a_function_of_time() -> None:
    model = MeanOfWindow(VPSDE())
    patched = PatchedModel(model, (4, 4), 0, shift=True)
    x = state(1, 1, 16, 16)
    times = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    each = torch.cat([patched.predict(x, t[None]).x0 for t in times])
    together = patched.predict(x.expand(9, -1, -1, -1), times).x0
    assert torch.allclose(each, together)
    rows = {tuple(one[0, :, 0].tolist()) for one in each}
    assert len(rows) == 4  # every offset of the first axis
    fixed = PatchedModel(model, (4, 4), 0).predict(x.expand(9, -1, -1, -1), times).x0
    assert torch.allclose(fixed, fixed[:1].expand_as(fixed))


def spread_of_differences(sde, overlap, **options):
    """The variance of differences of neighbors of samples of a Gaussian series, and exactly so.

    The sampler is linear: its samples are M z, with the columns of M from unit vectors.
    """
    field, patch, length = 80, 32, 4.0
    z = torch.eye(field, dtype=torch.float64)[:, None]
    noisy_start = isinstance(sde, FlowMatchingSDE)  # alpha(T) = 0
    grid = UniformGrid() if noisy_start else LogSNRGrid(t_end=sde.t_stop)
    options = {"grid": grid, "steps": 20, "denoise": False}, options
    values = []
    for model in (
        PatchedModel(
            GaussianFieldModel(sde, (patch,), length), patch, overlap, batch=500, **options[1]
        ),
        GaussianFieldModel(sde, (field,), length),
    ):
        columns = PCSampler(model, DDIM(), **options[0])(z * sde.prior_std)[:, 0]
        values.append(columns.diff(dim=1).square().sum(0))
    return values[0] / values[1]


def test_seams_of_a_gaussian_series() -> None:
    """Smooth weights, a margin and shifts each remove seams, on an exact model of patches."""
    excess = {
        "none": spread_of_differences(VPSDE(), 0),
        "shift": spread_of_differences(VPSDE(), 0, shift=True),
        "uniform": spread_of_differences(VPSDE(), 8, margin=0, blend="uniform"),
        "cosine": spread_of_differences(VPSDE(), 8, margin=0),
        "margin": spread_of_differences(VPSDE(), 8),
        "wide": spread_of_differences(VPSDE(), 16),
        "wide, shift": spread_of_differences(VPSDE(), 16, shift=True),
    }
    worst = {name: float(value.max()) - 1 for name, value in excess.items()}
    assert worst["none"] > 20
    assert worst["shift"] < 0.1 * worst["none"]
    assert worst["uniform"] > 0.5
    assert worst["cosine"] < 0.2
    assert worst["margin"] < 0.7 * worst["cosine"]
    assert worst["wide"] < 0.5 * worst["margin"]
    assert worst["wide"] < 0.02
    assert worst["wide, shift"] < worst["wide"]


@pytest.mark.parametrize(
    "sde", [VESDE(sigma_max=50.0), EDMSDE(), FlowMatchingSDE()], ids=lambda sde: type(sde).__name__
)
def test_seams_with_other_processes(sde) -> None:
    assert float(spread_of_differences(sde, 16).max()) < 1.02


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((0, 0), {}, ValueError, "patch: expected an integer >= 1, got 0"),
        ((8, 8), {}, ValueError, "overlap: expected less than the patch, 8, got 8"),
        (((8, 4), 4), {}, ValueError, "overlap: expected less than the patch, 4, got 4"),
        (((8, 4), (1, 2, 3)), {}, ValueError, "one for each axis, got"),
        ((8, 4), {"margin": 3}, ValueError, "margin: expected at most half of the overlap, 4"),
        ((8, 4), {"blend": "linear"}, ValueError, "blend: expected one of 'cosine', 'uniform'"),
        ((8, 4), {"batch": 0}, ValueError, "batch: expected an integer >= 1, got 0"),
        ((8, 4), {"periodic": 1}, TypeError, "periodic: expected one value, or one for each axis"),
        ((8.0, 4), {}, TypeError, "patch: expected an integer, got float"),
    ],
)
def test_wrong_arguments(arguments, options, error, text) -> None:
    with pytest.raises(error, match=text):
        PatchedModel(MeanOfWindow(VPSDE()), *arguments, **options)


def test_wrong_states() -> None:
    t = torch.tensor([0.5], dtype=torch.float64)
    model = MeanOfWindow(VPSDE())
    with pytest.raises(ValueError, match=r"x: expected a field, \(B, C, \*field\), got shape"):
        PatchedModel(model, 8, 4)(state(1, 2), t)
    with pytest.raises(ValueError, match=r"x: expected a field of 2 axes"):
        PatchedModel(model, (8, 8), 4)(state(1, 2, 20), t)
    with pytest.raises(ValueError, match=r"at least the patch, \(8, 8\), got \(20, 7\)"):
        PatchedModel(model, 8, 4)(state(1, 2, 20, 7), t)
