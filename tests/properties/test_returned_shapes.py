"""What users' parts return is checked wherever it is used: (B, 1) never broadcasts to (B, B)."""

import pytest
import torch
from support import seeded

from diffusionkit import (
    DDIM,
    NELBO,
    VLB,
    VPSDE,
    DDPMChain,
    EpsModel,
    ForwardSDE,
    GaussianDecoder,
    Hutchinson,
    HybridLoss,
    LikelihoodWeighting,
    NoiseClassifier,
    ODELikelihood,
    PCSampler,
    Prediction,
    ScoreMatching,
    ScoreModel,
    TargetEstimator,
    TimeSampler,
    UniformGrid,
    Weighting,
    classifier_loss,
)
from diffusionkit.likelihood import Dequantizer, Divergence

B = 4
X = torch.randn(B, 3, generator=seeded())
IMAGES = GaussianDecoder().encode(torch.randint(0, 256, (B, 3, 2, 2), generator=seeded()))


def model(sde=None):
    return EpsModel(lambda x, noise_label: 0 * x, VPSDE() if sde is None else sde)


# From what is right, (B,), to what a user may return instead.
WRONG = {
    "column": lambda v: v.unsqueeze(1),
    "as an image": lambda v: v.view(-1, 1, 1, 1),
    "row": lambda v: v.unsqueeze(0),
    "one": lambda v: v[:1],
    "too many": lambda v: torch.cat([v, v]),
    "no dimensions": lambda v: v[0],
    "number": lambda v: float(v[0]),
    "list": lambda v: v.tolist(),
    "integers": lambda v: v.long(),
    "nothing": lambda v: None,
}


class Wrong(Weighting):
    def __init__(self, change):
        self.change = change

    def __call__(self, sde, t):
        return self.change(1 + t)


class WrongTimes(TimeSampler):
    def __init__(self, change, index):
        self.change, self.index = change, index

    def sample(self, sde, n, *, generator=None, device=None, dtype=None):
        drawn = [torch.full((n,), 0.5, dtype=dtype), torch.ones(n, dtype=dtype)]
        drawn[self.index] = self.change(drawn[self.index])
        return tuple(drawn)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_weights(change):
    with pytest.raises((ValueError, TypeError), match=r"Wrong: expected weights"):
        ScoreMatching(Wrong(change))(model(), X)


@pytest.mark.parametrize("index", [0, 1], ids=["times", "weights"])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_times_and_their_weights(change, index):
    times = WrongTimes(change, index)
    chain = EpsModel(lambda x, noise_label: torch.cat([x, x], 1), DDPMChain.linear(100),
                     variance="learned_range")  # fmt: skip
    for ask in (
        lambda: ScoreMatching(times=times)(model(), X),
        lambda: ScoreMatching(LikelihoodWeighting(), times=times).nats(model(), X),
        lambda: VLB(times=times)(chain, IMAGES),
        lambda: HybridLoss(times=times)(chain, IMAGES),
        lambda: classifier_loss(lambda x, t: x, VPSDE(), X, torch.zeros(B).long(), times=times),
    ):
        with pytest.raises((ValueError, TypeError), match=r"WrongTimes: expected (times|weights)"):
            ask()


TARGETS = {
    "without the batch": lambda v: v.mean(0),
    "of one sample": lambda v: v[:1],
    "flat": lambda v: v.flatten(),
    "of channels": lambda v: v[:, :1],
}


@pytest.mark.parametrize("change", TARGETS.values(), ids=TARGETS)
def test_targets(change):
    class Target(TargetEstimator):
        def __call__(self, sample, reference=None, **cond):
            x0, eps = change(sample.x0), change(sample.eps)
            return Prediction(sample.x, x0, eps, sample.alpha, sample.sigma)

    with pytest.raises(ValueError, match="x0: expected the shape of x"):
        ScoreMatching(target=Target())(model(), X)


def test_a_target_is_a_prediction():
    class Noise(TargetEstimator):
        def __call__(self, sample, reference=None, **cond):
            return sample.eps

    with pytest.raises(TypeError, match="Noise: expected a Prediction, got Tensor"):
        ScoreMatching(target=Noise())(model(), X)


@pytest.mark.parametrize("change", list(WRONG.values())[:-1], ids=list(WRONG)[:-1])
@pytest.mark.parametrize("which", [0, 1], ids=["alpha", "sigma"])
def test_schedules(change, which):
    if change is WRONG["integers"]:
        return  # a schedule of one dtype with the times is asked for by check_sde

    class Process(ForwardSDE):
        def marginal(self, t):
            values = [torch.exp(-2 * t * t), torch.sqrt(-torch.expm1(-4 * t * t))]
            values[which] = change(values[which])
            return tuple(values)

    sde = Process()
    for ask in (
        lambda: ScoreMatching()(model(sde), X),
        lambda: ScoreMatching(LikelihoodWeighting())(model(sde), X, t=torch.full((B,), 0.5)),
        lambda: sde.perturb(X, torch.full((B,), 0.5)),
        lambda: model(sde).predict(X, torch.full((B,), 0.5)),
        lambda: sde.transition(torch.full((B,), 0.4), torch.full((B,), 0.5)),
        lambda: sde.diffusion(torch.full((B,), 0.5)),
        lambda: sde.time_at_log_snr(torch.zeros(B)),
        lambda: PCSampler(model(sde), DDIM(), steps=2, grid=UniformGrid())(X),
        lambda: NELBO(model(sde))(X),
        lambda: ODELikelihood(model(sde))(X),
    ):
        with pytest.raises((ValueError, TypeError), match=r"Process: expected (alpha|sigma)"):
            ask()


@pytest.mark.parametrize("name", ["drift_coefficient", "diffusion", "log_snr", "time_at_log_snr"])
def test_closed_forms_of_a_process(name):
    """A subclass's own closed forms are checked as its definition is, inherited or not."""

    class Column:
        pass

    setattr(Column, name, lambda self, t: torch.ones_like(t).unsqueeze(1))

    class Process(Column, ForwardSDE):
        def marginal(self, t):
            return torch.exp(-2 * t * t), torch.sqrt(-torch.expm1(-4 * t * t))

    with pytest.raises(ValueError, match=rf"Process: expected {name} as a tensor of the shape"):
        getattr(Process(), name)(torch.full((B,), 0.5))


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_noise_labels(change):
    if change is WRONG["integers"]:
        return  # labels that are whole numbers are converted

    def network(x, noise_label):
        return x * noise_label.view(-1, 1)

    def label(sde, t):
        return change(t)

    t = torch.full((B,), 0.5)
    wrong = EpsModel(network, VPSDE(), label=label)
    classifier = NoiseClassifier(network, VPSDE(), label=label)
    for ask in (
        lambda: wrong.predict(X, t),
        lambda: ScoreMatching()(wrong, X),
        lambda: PCSampler(wrong, DDIM(), steps=2)(X),
        lambda: classifier_loss(classifier, VPSDE(), X, torch.zeros(B).long()),
    ):
        with pytest.raises((ValueError, TypeError), match=r"label: expected .*shape of t, \(4,\)"):
            ask()


PREDICTIONS = {
    "score": lambda x, **_: -x,
    "a smaller state": lambda x, alpha, sigma: Prediction.from_eps(x[:1], x[:1], alpha, sigma),
    "a smaller noise": lambda x, alpha, sigma: Prediction.from_eps(x, x[:, :1], alpha, sigma),
    "data": lambda x, alpha, sigma: Prediction(x, x.mean(1), x, alpha, sigma),
    "nothing": lambda x, **_: None,
}


@pytest.mark.parametrize("answer", PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions_of_a_model(answer):
    class Own(ScoreModel):
        sde = VPSDE()

        def predict(self, x, t, **cond):
            alpha, sigma = self.sde.perturbation_kernel(x, t)
            return answer(x, alpha=alpha, sigma=sigma)

    for ask in (
        lambda: Own()(X, torch.full((B,), 0.5)),
        lambda: ScoreMatching()(Own(), X),
        lambda: NELBO(Own())(X),
        lambda: PCSampler(Own(), DDIM(), steps=2)(X),
    ):
        with pytest.raises((ValueError, TypeError), match=r"(Own|x0|eps|output): expected"):
            ask()


class StaticProcess(ForwardSDE):
    @staticmethod
    def marginal(t):
        return torch.exp(-2 * t * t), torch.sqrt(-torch.expm1(-4 * t * t))


class ClassProcess(ForwardSDE):
    rate = 2.0

    @classmethod
    def marginal(cls, t):
        return [torch.exp(-cls.rate * t * t), torch.sqrt(-torch.expm1(-2 * cls.rate * t * t))]


class PlainProcess(ForwardSDE):
    def marginal(self, t):
        return torch.exp(-2 * t * t), torch.sqrt(-torch.expm1(-4 * t * t))


@pytest.mark.parametrize("process", [StaticProcess, ClassProcess])
def test_methods_of_any_kind(process):
    """Static and class methods are what they were, and are checked."""
    losses = [
        ScoreMatching(LikelihoodWeighting())(model(sde), X, generator=seeded(1))
        for sde in (process(), PlainProcess())
    ]
    torch.testing.assert_close(*losses)
    t = torch.full((B,), 0.5)
    torch.testing.assert_close(list(process.marginal(t)), list(PlainProcess().marginal(t)))

    class Column(process):
        @staticmethod
        def log_snr(t):
            return t.unsqueeze(1)

    with pytest.raises(ValueError, match="Column: expected log_snr as a tensor of the shape of t"):
        Column().log_snr(t)


@pytest.mark.parametrize("change", list(WRONG.values())[:-2], ids=list(WRONG)[:-2])
def test_densities_of_a_prior(change):
    class Process(PlainProcess):
        def prior_log_prob(self, x):
            return change(super().prior_log_prob(x))

    with pytest.raises((ValueError, TypeError), match="Process: expected log-densities"):
        ODELikelihood(model(Process()))(X)


def test_dequantizers():
    class Wide(Dequantizer):
        def noise(self, images, *, generator=None, **cond):
            return torch.full(images.shape, 0.5), torch.zeros(len(images), 1)

    class Small(Dequantizer):
        def noise(self, images, *, generator=None, **cond):
            return torch.full((len(images), 1, 1, 1), 0.5), torch.zeros(len(images))

    images = torch.zeros(B, 3, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Wide: expected log q as a tensor of shape \(4,\)"):
        Wide()(images)
    with pytest.raises(ValueError, match="Small: expected u of the shape of the images"):
        Small()(images)


def test_divergences():
    class Column(Divergence):
        def start(self, x, generator=None):
            return None

        def __call__(self, function, x, state):
            return function(x), torch.zeros(len(x), 1)

    with pytest.raises(ValueError, match=r"Column: expected a divergence of shape \(1, 4\)"):
        ODELikelihood(model(), divergence=Column())(X)
    with pytest.raises(ValueError, match=r"Column: expected a divergence of shape \(1, 4\)"):
        NELBO(model(), divergence=Column())(X)
    assert NELBO(model(), divergence=Hutchinson(2))(X).nats.shape == (B,)


def test_a_sampler_of_times_with_one_generator_for_each_sample():
    """Torch's draws take one generator; the times of a sample do not depend on its batch."""

    class LateTimes(TimeSampler):
        def sample(self, sde, n, *, generator=None, device=None, dtype=None):
            u = torch.rand(n, generator=generator, device=device, dtype=dtype)
            return 0.5 + 0.5 * u, torch.ones_like(u)

    def losses(*seeds):
        each = [seeded(seed) for seed in seeds]
        return ScoreMatching(times=LateTimes())(model(), torch.zeros(len(seeds), 3), generator=each)

    together = losses(0, 1, 2)
    assert torch.equal(together[2:], losses(2))
    assert len(together.unique()) == 3
