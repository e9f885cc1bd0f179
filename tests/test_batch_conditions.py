"""Conditions given once for a whole batch, and conditions with the names of parameters."""

import pytest
import torch
from torch import Tensor, nn

from diffusionkit import (
    DDIM,
    NELBO,
    VPSDE,
    AnnealedLangevin,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    EpsModel,
    ODELikelihood,
    PCSampler,
    ProbabilityFlow,
    ScoreMatching,
    ddim_encode,
)
from diffusionkit._batch_conditions import for_batch, repeated
from diffusionkit.networks import MLP, ADMUNet
from diffusionkit.training import held_out_loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(network: nn.Module) -> nn.Module:
    generator = seeded(1)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
    return network


OBSERVED = torch.tensor([0.5, -1.0, 2.0])
VECTORS = EpsModel(filled(MLP(2, width=8, condition_features=3, num_classes=4)), VPSDE())
N = 6


def both(one: Tensor, label: Tensor) -> dict[str, Tensor]:
    return {"condition": one, "class_labels": label}


EACH = both(OBSERVED.expand(N, 3).clone(), torch.full((N,), 2))
ONCE = [
    both(OBSERVED, torch.tensor(2)),
    both(OBSERVED[None], torch.tensor([2])),
    both(OBSERVED.expand(N, 3), torch.tensor(2)),
]
X = torch.randn(N, 2, generator=seeded(2))

RUNS = {
    "sampler": lambda m, c: PCSampler(m, DDIM(), AnnealedLangevin(), steps=3)(
        (N, 2), generator=seeded(), **c
    ),
    "edit": lambda m, c: PCSampler(m, DDIM(), steps=3).edit(X, 0.7, generator=seeded(), **c),
    "flow": lambda m, c: ProbabilityFlow(m, "euler", options={"step_size": 0.4}).sample(
        (N, 2), generator=seeded(), **c
    ),
    "interpolate": lambda m, c: ProbabilityFlow(m, "euler", options={"step_size": 0.4}).interpolate(
        X, -X, steps=3, **c
    ),
    "encode": lambda m, c: ddim_encode(m, X, steps=3, **c),
    "likelihood": lambda m, c: ODELikelihood(
        m, method="euler", options={"step_size": 0.4}
    )(X, generator=seeded(), **c).log_prob,
    "nelbo": lambda m, c: NELBO(m)(X, generator=seeded(), **c).nats,
    "objective": lambda m, c: ScoreMatching()(m, X, generator=seeded(), **c),
    "held out": lambda m, c: held_out_loss(ScoreMatching(), m, X, batch_size=4, cond=c).mean,
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_one_condition_for_all_samples(run: str) -> None:
    expected = RUNS[run](VECTORS, EACH)
    for cond in ONCE:
        if run == "held out":
            cond = {**cond, "condition": cond["condition"].reshape(-1, 3)}
        got = RUNS[run](VECTORS, cond)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_one_condition_under_guidance() -> None:
    t = torch.full((N,), 0.4)
    free = ClassifierFreeGuidance(
        VECTORS, 2.0, null={"class_labels": 3, "condition": torch.zeros(3)}
    )
    classifier = filled(MLP(2, width=8, out_features=4))
    guided = ClassifierGuidance(VECTORS, classifier, conditional=True)
    for model in (free, guided):
        expected = model.predict(X, t, **EACH).eps
        for cond in ONCE:
            torch.testing.assert_close(model.predict(X, t, **cond).eps, expected)


def test_one_condition_for_networks_of_images() -> None:
    network = ADMUNet(
        channels=1,
        width=8,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(),
        learn_sigma=False,
        num_classes=4,
        condition_features=3,
        low_res_channels=1,
    )
    model = EpsModel(filled(network), VPSDE())
    x, small = torch.randn(N, 1, 4, 4), torch.randn(1, 1, 2, 2)
    sampler = PCSampler(model, DDIM(), steps=2)
    expected = sampler(x, low_res=small.expand(N, -1, -1, -1).clone(), **EACH)
    assert (expected[0] - sampler(x, low_res=0 * small, **EACH)[0]).abs().max() > 1e-4
    for cond in ONCE:
        torch.testing.assert_close(sampler(x, low_res=small, **cond), expected)


def test_a_batch_of_the_condition_s_size_does_not_confuse() -> None:
    # (3,) is one observation also where there are three samples.
    x, t = torch.randn(3, 2), torch.full((3,), 0.4)
    labels = torch.tensor([0, 1, 2])
    expected = VECTORS.predict(x, t, condition=OBSERVED.expand(3, 3), class_labels=labels).eps
    got = VECTORS.predict(x, t, condition=OBSERVED, class_labels=labels).eps
    assert torch.equal(got, expected)
    # Where the batch is repeated, it would be taken for a number of each sample, and is refused.
    flow = ProbabilityFlow(VECTORS, "euler", options={"step_size": 0.4})
    with pytest.raises(ValueError, match=r"condition: expected shape \(6, 3\), or \(3,\)"):
        flow.interpolate(x, -x, steps=2, condition=OBSERVED, class_labels=labels)


@pytest.mark.parametrize(
    ("condition", "error", "match"),
    [
        (None, TypeError, r"condition: expected a tensor \(B, 3\), or \(3,\) for all samples"),
        (torch.zeros(2, 3), ValueError, r"expected shape \(6, 3\), or \(3,\) .* got \(2, 3\)"),
        (torch.zeros(N), ValueError, r"expected shape \(6, 3\), or \(3,\) .* got \(6,\)"),
        (torch.zeros(1, 1, 3), ValueError, r"expected shape \(6, 3\)"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "condition: expected a floating-point"),
    ],
)
def test_other_conditions_are_refused(condition, error, match) -> None:
    cond = {"class_labels": torch.tensor(1)}
    if condition is not None:
        cond["condition"] = condition
    with pytest.raises(error, match=match):
        PCSampler(VECTORS, DDIM(), steps=2)((N, 2), **cond)


def test_any_model_gets_a_condition_for_each_sample() -> None:
    seen = {}

    def network(x: Tensor, noise_label: Tensor, **cond: Tensor) -> Tensor:
        seen.update(cond)
        return 0 * x

    model = EpsModel(network, VPSDE())
    model.predict(
        torch.ones(4, 2),
        torch.full((4,), 0.5),
        observed=torch.ones(1, 3),
        class_labels=torch.tensor(1),
        number=torch.tensor(2.0),
        vector=torch.ones(1),
        name="a",
    )
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in seen.items()}
    assert shapes == {
        "observed": (4, 3), "class_labels": (4,), "number": (), "vector": (1,), "name": (),
    }  # fmt: skip


def test_what_is_expanded_and_repeated() -> None:
    assert for_batch({"class_labels": torch.tensor([7])}, 3)["class_labels"].tolist() == [7, 7, 7]
    assert for_batch({"a": torch.ones(2, 3)}, 5)["a"].shape == (2, 3)
    assert repeated(torch.tensor([1, 2]), 2, 2).tolist() == [1, 2, 1, 2]
    assert repeated(torch.ones(1, 3), 2, 2).shape == (1, 3)
