"""Fitted grids: optimal on one level, better than fixed ones, stored, and refused elsewhere."""

import json

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DPMSolver2M,
    FittedGrid,
    GaussianMixtureModel,
    Heun,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    Prediction,
    ProbabilityFlow,
    ScoreModel,
    UniPC,
    fit_grid,
)
from diffusionkit.checkpoints import load_model, save_model

DOUBLE = torch.float64


def two_modes():
    return GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])


def rms(model, predictor, grid, x):
    flow = ProbabilityFlow(model, rtol=1e-7, atol=1e-7)
    sampler = PCSampler(model, predictor, grid=grid, steps=grid.steps, denoise=False)
    found = sampler(x) - flow.sample(x)
    assert sampler.nfe == grid.nfe
    return float(found.square().mean().sqrt())


def improves(model, predictor):
    """Return whether a fit takes a third of the error of two grids away, on new draws."""
    start = model.sde.prior_sample((128, 2), generator=seeded(), dtype=DOUBLE)
    grid = fit_grid(model, predictor, start, steps=6, iterations=4)
    assert grid.steps == grid.nfe == 6
    x = model.sde.prior_sample((256, 2), generator=seeded(1), dtype=DOUBLE)
    exact = ProbabilityFlow(model, rtol=1e-6, atol=1e-6).sample(x)
    errors = [
        float((PCSampler(model, predictor, grid=one, steps=6, denoise=False)(x) - exact).norm())
        for one in (grid, LogSNRGrid(), KarrasGrid())
    ]
    # The best fixed grid of all may be that good without a search.
    return errors[0] < 0.65 * min(errors[1:]) and grid.error < 0.95 * grid.fixed_error


def test_fitted_grids_are_better_than_fixed_ones_on_new_draws(mixture):
    assert improves(mixture, UniPC())


@pytest.mark.parametrize("predictor", [DDIM(), DEIS(), DPMSolver2M()], ids=str)
def test_grids_are_fitted_for_every_solver(predictor):
    assert improves(GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3]), predictor)


def test_the_reported_error_is_that_of_the_held_out_half():
    mixture = two_modes()
    x = mixture.sde.prior_sample((20, 2), generator=seeded(3), dtype=DOUBLE)
    grid = fit_grid(mixture, DEIS(), x, steps=5, tolerance=1e-7)
    held_out = x[torch.randperm(20, generator=seeded(0))[10:]]
    assert rms(mixture, DEIS(), grid, held_out) == pytest.approx(grid.error, rel=1e-3)


@pytest.mark.parametrize("to_zero", [True, False])
def test_the_best_single_level_is_found(to_zero):
    """Of grids T, t, 0, and of T, t with a fixed predictor: as a scan over t finds."""
    model = GaussianMixtureModel(EDMSDE(sigma_max=10.0), [[-1.0], [0.8]], [0.2, 0.4], [0.3, 0.7])
    x = model.sde.prior_sample((200, 1), generator=seeded(1), dtype=DOUBLE)
    exact = ProbabilityFlow(model, rtol=1e-8, atol=1e-8).sample(x)
    ends = [0.0] if to_zero else torch.logspace(-2, -0.5, 8).tolist()
    least = min(
        float((PCSampler(model, DDIM(), grid=torch.tensor([10.0, t, end], dtype=DOUBLE),
                         denoise=False)(x) - exact).square().mean().sqrt())
        for t in torch.logspace(-0.4, 0.9, 24).tolist() for end in ends
    )  # fmt: skip
    start = torch.tensor([10.0, 5.0, 0.0 if to_zero else 0.02])
    grid = fit_grid(model, DDIM(), x, steps=2, grids=[start], iterations=40)
    assert rms(model, DDIM(), grid, x) < 1.02 * least


def test_the_best_of_several_predictors_is_returned():
    model = two_modes()
    x = model.sde.prior_sample((40, 2), generator=seeded(5), dtype=DOUBLE)
    exact = ProbabilityFlow(model, rtol=1e-6, atol=1e-6).sample(x)
    predictors = DDIM(), DEIS(), DPMSolver2M()
    single = [fit_grid(model, p, x, steps=4, target=exact, iterations=4) for p in predictors]
    best = fit_grid(model, predictors, x, steps=4, target=exact, iterations=4)
    assert best.error == min(grid.error for grid in single)
    assert best.fixed_error == min(grid.fixed_error for grid in single)
    assert {repr(p): p for p in predictors}[best.predictor] != DDIM()


def test_a_given_target_is_what_is_fitted():
    """One that a solver reaches on some grid: the grid is found."""
    model = GaussianMixtureModel(EDMSDE(), [[-1.0], [0.8]], [0.2, 0.4])
    x = model.sde.prior_sample((64, 1), generator=seeded(6), dtype=DOUBLE)
    times = torch.tensor([80.0, 7.0, 1.1, 0.3, 0.06], dtype=DOUBLE)
    target = PCSampler(model, DEIS(), grid=times, denoise=False)(x)
    grid = fit_grid(model, DEIS(), x, steps=4, target=target, iterations=40)
    assert grid.error < 1e-3 < 0.01 < grid.fixed_error
    torch.testing.assert_close(torch.tensor(grid.times, dtype=DOUBLE), times, rtol=0.05, atol=0)


def test_a_fit_takes_few_runs():
    """Also with many draws, where the search begins with some of them."""
    means = 0.2 * torch.randn(4, 32, generator=seeded(9))
    model, counted = GaussianMixtureModel(EDMSDE(), means, [0.3] * 4), []
    predict = model.predict
    model.predict = lambda x, t: counted.append(len(x)) or predict(x, t)
    x = model.sde.prior_sample((256, 32), generator=seeded(7))
    target = ProbabilityFlow(model, rtol=1e-4, atol=1e-4).sample(x)
    counted.clear()
    grid = fit_grid(model, DEIS(), x, steps=6, target=target)
    assert sum(counted) < 63 * grid.nfe * len(x)  # evaluations of 63 runs with all draws
    assert grid.error < 0.7 * grid.fixed_error


class Labelled(ScoreModel):
    """Data at the class label."""

    def __init__(self):
        super().__init__()
        self.sde = VPSDE()
        self.seen = []

    def predict(self, x, t, /, *, class_labels, scale=1.0):
        if float(t[0]) == self.sde.T:
            self.seen += zip(x[:, 0].tolist(), class_labels.tolist(), strict=True)
        alpha, sigma = self.sde.perturbation_kernel(x, t)
        x0 = (scale * class_labels.to(x)).unsqueeze(1).expand_as(x)
        return Prediction.from_x0(x, x0, alpha, sigma)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_draw_keeps_its_condition(batch_size):
    """DDIM follows the flow to a point exactly, to that of the right label."""
    model, labels = Labelled(), torch.arange(10)
    start = labels.double().unsqueeze(1).repeat(1, 2)  # each state at T is its label
    grid = fit_grid(
        model, DDIM(), start, steps=3, tolerance=1e-8, batch_size=batch_size,
        class_labels=labels, scale=2.0,
    )  # fmt: skip
    assert len(model.seen) > 100
    assert all(state == pytest.approx(label) for state, label in model.seen)
    assert grid.fixed_error < 1e-3


def test_one_condition_serves_all_draws():
    grid = fit_grid(
        Labelled(), DDIM(), (10, 2), steps=3, generator=seeded(), class_labels=torch.tensor([4])
    )
    assert grid.fixed_error < 1e-2


def test_batches_and_repeated_runs_give_the_same_grid():
    one, two, three = (
        fit_grid(two_modes(), UniPC(), (24, 2), steps=4, iterations=2, batch_size=size,
                 generator=seeded(), dtype=DOUBLE)
        for size in (None, None, 7)
    )  # fmt: skip
    assert one == two
    # The flow's adaptive steps are chosen for each batch.
    times = [torch.tensor(grid.times) for grid in (one, three)]
    torch.testing.assert_close(*times, rtol=2e-3, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_to_few_draws_is_never_worse_than_the_start_on_the_held_out_ones(seed):
    means = torch.randn(6, 12, generator=seeded(9)).tolist()
    model = GaussianMixtureModel(EDMSDE(), means, [0.2] * 6)
    x = model.sde.prior_sample((4, 12), generator=seeded(seed), dtype=DOUBLE)
    grid = fit_grid(model, DEIS(), x, steps=4, iterations=5)
    again = fit_grid(model, DEIS(), x, steps=4, iterations=0)
    assert again.error == again.fixed_error == grid.fixed_error
    assert grid.error <= grid.fixed_error


def test_progress_shows_iterations():
    shown = []

    def wrapper(items):
        shown.append(len(items))
        return items

    model = GaussianMixtureModel(VPSDE(), [[0.0]], [0.5])
    fit_grid(model, DDIM(), (8, 1), steps=2, iterations=3, generator=seeded(), progress=wrapper)
    assert shown == [6]


def test_two_stages_count_their_evaluations():
    model = GaussianMixtureModel(VPSDE(), [[-1.0], [1.0]], [0.5, 0.3])
    grid = fit_grid(model, Heun(), (16, 1), steps=4, iterations=3, generator=seeded())
    assert grid.nfe == (7 if grid.times[-1] == 0 else 8)


@pytest.fixture(scope="module")
def fitted() -> FittedGrid:
    model = GaussianMixtureModel(VPSDE(), [[-1.0], [1.0]], [0.5, 0.3])
    return fit_grid(model, DEIS(), (16, 1), steps=4, iterations=2, generator=seeded())


def test_stored_grids_are_equal(fitted, tmp_path):
    fitted.save(tmp_path / "grid.json")
    again = FittedGrid.load(tmp_path / "grid.json")
    assert again == fitted
    assert hash(again) == hash(fitted)
    assert torch.equal(again(VPSDE(), 4), fitted(VPSDE(), 4))
    assert "VPSDE" in again.process
    assert "DEIS" in again.predictor


def test_grids_lie_beside_the_model(fitted, tmp_path):
    save_model(tmp_path / "model", GaussianMixtureModel(VPSDE(), [[-1.0], [1.0]], [0.5, 0.3]))
    fitted.save(tmp_path / "model" / "deis_4.json")
    model = load_model(tmp_path / "model")
    grid = FittedGrid.load(tmp_path / "model" / "deis_4.json")
    sampler = PCSampler(model, DEIS(), grid=grid, steps=4, denoise=False)
    assert sampler((3, 1), generator=seeded()).shape == (3, 1)
    assert sampler.nfe == 4


@pytest.mark.parametrize("sde", [VPSDE(beta_max=19.0), VESDE(), EDMSDE()], ids=str)
def test_other_processes_are_refused(fitted, sde):
    with pytest.raises(ValueError, match=r"sde: expected the process .* VPSDE\(.*, got "):
        fitted(sde, 4)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "expected a grid"),
        ("[]", "another kind of file"),
        ('{"format": "x"}', "another kind of file"),
        ('{"format": "diffusionkit.grid", "version": 2}', "newer diffusionkit"),
        ('{"format": "diffusionkit.grid", "version": 1}', "values of a grid"),
        (None, "values of a grid, got times"),
    ],
)
def test_damaged_files_are_refused(fitted, tmp_path, content, match):
    file = tmp_path / "grid.json"
    if content is None:
        fitted.save(file)
        content = json.dumps(json.loads(file.read_text()) | {"times": [0.1, 0.2, 0.3, 0.4, 0.5]})
    file.write_text(content)
    with pytest.raises(ValueError, match=match):
        FittedGrid.load(file)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m, g: g(VPSDE(), 5), "steps: expected 4, which the grid was fitted for, got 5"),
        (lambda m, g: PCSampler(m, DEIS(), grid=g), "steps: expected 4"),
        (lambda m, g: g.save("grid.pt"), "path: expected a name such as deis_8.json"),
        (lambda m, g: g.save("model.json"), "path: expected a name such as"),
        (lambda m, g: fit_grid(m, Ancestral(), (8, 1), steps=3),
         "predictor: expected a deterministic one, .* got Ancestral"),
        (lambda m, g: fit_grid(m, [DDIM(), Ancestral()], (8, 1), steps=3),
         "predictor: expected a deterministic one, .* got Ancestral"),
        (lambda m, g: fit_grid(m, [], (8, 1), steps=3), "predictor: expected a predictor or"),
        (lambda m, g: fit_grid(m, DDIM(), (8, 1), steps=3, target=torch.zeros(8, 1)),
         "target: expected the end points .* no states"),
        (lambda m, g: fit_grid(m, DDIM(), torch.zeros(8, 1), steps=3, target=torch.zeros(7, 1)),
         r"target: expected the end points .* shape \(7, 1\) and \(8, 1\)"),
        (lambda m, g: fit_grid(m, DEIS(), (3, 1), steps=3), "start: expected 4 draws or more"),
        (lambda m, g: fit_grid(m, DEIS(), (8, 1), steps=1), "steps: expected an integer >= 2"),
        (lambda m, g: fit_grid(m, DEIS(), (8, 1), steps=3, grids=[LogSNRGrid(), g]),
         "steps: expected 4"),
        (lambda m, g: fit_grid(m, DEIS(), (8, 1), steps=3,
                               grids=[torch.tensor([0.9, 0.5, 0.1, 0.0])]),
         "grids: expected grids of 3 steps from T = 1"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(fitted, make, match):
    model = GaussianMixtureModel(VPSDE(), [[-1.0], [1.0]], [0.5, 0.3])
    with pytest.raises(ValueError, match=match):
        make(model, fitted)
