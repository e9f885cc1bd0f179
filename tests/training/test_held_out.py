"""The loss on held-out data: fixed draws, standard errors, any number of processes."""

import math

import pytest
import torch
from support.processes import run_in_processes
from torch.utils.data import TensorDataset

from diffusionkit import (
    VPSDE,
    EpsModel,
    GaussianMixtureModel,
    LossSecondMomentTimes,
    ScoreMatching,
    held_out_loss,
)
from diffusionkit.random import seeded

DATA = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
MODEL = GaussianMixtureModel(VPSDE(), means=torch.zeros(1, 2), stds=[0.5])

PROGRAM = """
from diffusionkit import GaussianMixtureModel, ScoreMatching, VPSDE, held_out_loss

data = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
model = GaussianMixtureModel(VPSDE(), means=torch.zeros(1, 2), stds=[0.5])
found = held_out_loss(ScoreMatching(), model, data, batch_size=3, draws=2)
result = found.mean, found.stderr, found.losses
"""


def test_each_item_has_its_own_draws():
    found = held_out_loss(ScoreMatching(), MODEL, DATA, batch_size=4, draws=2, seed=3)
    for item in (0, 9):
        for draw in (0, 1):
            expected = ScoreMatching()(
                MODEL, DATA[item : item + 1], generator=[seeded(3, draw, item)]
            )
            assert float(found.losses[item, draw]) == pytest.approx(float(expected), rel=1e-5)
    assert found.mean == float(found.losses.mean(1).mean())
    assert found.stderr == pytest.approx(float(found.losses.mean(1).std()) / math.sqrt(10))
    assert str(found) == f"{found.mean:.5f} +- {found.stderr:.5f}"


def test_the_mean_is_that_of_a_closed_form():
    """At one time, the exact model of N(0, s^2) has the loss alpha^2 s^2 / (alpha^2 s^2 + v)."""
    sde = VPSDE()
    t = torch.tensor([0.4], dtype=torch.float64)
    alpha, sigma = (float(c) for c in sde.marginal(t))
    expected = (alpha * 0.5) ** 2 / ((alpha * 0.5) ** 2 + sigma**2)
    data = 0.5 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(1))

    def objective(model, x0, generator):
        return ScoreMatching()(model, x0, t=t.float().expand(len(x0)), generator=generator)

    found = held_out_loss(objective, MODEL, data, batch_size=1000)
    assert abs(found.mean - expected) < 4 * found.stderr
    assert found.stderr < 0.03 * expected


@pytest.mark.slow  # several processes
def test_all_digits_are_equal_at_1_and_3_processes(tmp_path):
    alone = held_out_loss(ScoreMatching(), MODEL, DATA, batch_size=3, draws=2)
    for mean, stderr, losses in run_in_processes(3, PROGRAM, tmp_path):
        assert (mean, stderr) == (alone.mean, alone.stderr)
        assert torch.equal(losses, alone.losses)


def test_data_sets_transforms_and_conditions():
    images = (DATA * 50 + 128).clamp(0, 255).to(torch.uint8)
    labels = torch.arange(10)
    seen = []

    def objective(model, x0, generator, class_labels):
        seen.extend(class_labels.tolist())
        return ScoreMatching()(model, x0, generator=generator)

    found = held_out_loss(
        objective,
        MODEL,
        TensorDataset(images, labels),
        transform=lambda x: x / 127.5 - 1,
        cond={"class_labels": labels},
        batch_size=4,
    )
    assert seen == labels.tolist()
    direct = held_out_loss(ScoreMatching(), MODEL, images / 127.5 - 1, batch_size=4)
    assert torch.equal(found.losses, direct.losses)


def test_the_mode_of_the_model_is_kept_and_random_numbers_too():
    MODEL.train()
    state = torch.get_rng_state()
    held_out_loss(lambda model, x, generator: x.sum(1) * model.training, MODEL, DATA)
    assert torch.equal(state, torch.get_rng_state())
    assert MODEL.training


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="times that do not adapt to losses, got LossSecondMoment"):
        held_out_loss(ScoreMatching(times=LossSecondMomentTimes()), MODEL, DATA)
    with pytest.raises(ValueError, match=r"objective: expected losses \(10,\), got \(10, 2\)"):
        held_out_loss(lambda model, x, generator: x, MODEL, DATA)
    with pytest.raises(ValueError, match="class_labels: expected 10 entries"):
        held_out_loss(ScoreMatching(), MODEL, DATA, cond={"class_labels": torch.ones(3)})
    with pytest.raises(ValueError, match="data: expected at least one item"):
        held_out_loss(ScoreMatching(), MODEL, DATA[:0])


def test_masks_are_conditions_of_the_data_set():
    """One for each item, or one for all: the losses are those of the objective with the mask."""
    data = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[:, 0] = True
    holes = data.masked_fill(~mask, math.nan)
    model = EpsModel(lambda x, noise_label: 0.5 * x, VPSDE())
    got = held_out_loss(ScoreMatching(), model, holes, cond={"mask": mask}, batch_size=2).losses
    for i in range(5):
        short = holes[i : i + 1], mask[i : i + 1]
        right = ScoreMatching()(model, short[0], mask=short[1], generator=[seeded(0, 0, i)])
        torch.testing.assert_close(got[i], right.double())
    same = held_out_loss(ScoreMatching(), model, data, cond={"mask": torch.ones(1, 4)}).losses
    plain = held_out_loss(ScoreMatching(), model, data).losses
    torch.testing.assert_close(same, plain)
