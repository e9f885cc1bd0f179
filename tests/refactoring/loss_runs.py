"""Runs of processes, models and losses."""

import math

import torch
from run_parts import (
    LEARNED,
    MODELS,
    PROCESSES,
    fill,
    flat,
    mixture_on,
    model_on,
    network,
    randint,
    randn,
    seeded,
    several,
    times,
)

from diffusionkit import (
    EDMSDE,
    VLB,
    Ancestral,
    DDPMChain,
    DiscreteTimes,
    EDMWeighting,
    EmpiricalModel,
    EpsModel,
    ForwardSDE,
    GaussianDecoder,
    HybridLoss,
    ImportanceTimes,
    IndexLabel,
    LearnedSDE,
    LikelihoodWeighting,
    LogNormalTimes,
    LogSigmaLabel,
    LogSNRSDE,
    LossSecondMomentTimes,
    MinSNRWeighting,
    NoiseClassifier,
    PCSampler,
    ReferenceBatches,
    ScheduleTransformedModel,
    ScoreMatching,
    SigmaLabel,
    SimpleWeighting,
    StableTarget,
    StepLabel,
    StratifiedTimes,
    TimeLabel,
    UniformTimes,
    classifier_loss,
    drop_conditions,
    suggest_sigma_max,
    train_noise_classifier,
)
from diffusionkit.diagnostics import (
    dsm_variance,
    gradient_variance,
    posterior_divergence,
    stf_variance,
)
from diffusionkit.networks import MLP

X0 = randn(6, 2)


def processes():
    """Every closed form of every process, and its draws."""
    found = {}
    more = {"learned": fill(LearnedSDE(hidden=8)), "log_snr": LogSNRSDE()}
    for name, sde in {**PROCESSES, **more}.items():
        for dtype in (torch.float32, torch.float64):
            t = times(sde, 6, dtype)
            parts = [*sde.marginal(t), sde.log_snr(t), sde.drift_coefficient(t), sde.diffusion(t)]
            parts += [*sde.transition(0.5 * t, t), sde.time_at_log_snr(sde.log_snr(t))]
            found[f"{name} {dtype}"] = torch.stack(parts)
        sample = sde.perturb(X0, times(sde, 6), generator=seeded())
        prior = sde.prior_sample((6, 2), generator=several(6))
        found[name] = torch.cat([sample.x, sample.eps, prior, sde.drift(X0, times(sde, 6))])
        found[f"{name} log_prob"] = sde.prior_log_prob(prior)
    return found


def own_process():
    """A process of which only alpha and sigma are written: the rest is derived from them."""

    class Cosine(ForwardSDE):
        def marginal(self, t):
            angle = (0.01 + 0.98 * t) * math.pi / 2
            return torch.cos(angle), torch.sin(angle)

    sde, t = Cosine(), torch.linspace(0.04, 1.0, 6, dtype=torch.float64)
    model = EpsModel(network(), sde)
    return {
        "drift": sde.drift_coefficient(t),
        "diffusion": sde.diffusion(t),
        "times": sde.time_at_log_snr(sde.log_snr(t)),
        "transition": sde.transition(0.5 * t, t),
        "loss": ScoreMatching(LikelihoodWeighting())(model, X0, generator=seeded()),
        "samples": PCSampler(model, Ancestral(), steps=4)((4, 2), generator=seeded()),
    }


def chains():
    """Other ways to make a chain, and its parts."""
    cosine = DDPMChain.cosine(20)
    t = torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    return {
        "cosine": cosine.marginal(t),
        "zero terminal": cosine.zero_terminal_snr().marginal(t),
        "respaced": cosine.respaced("5,3"),
        "ddim": cosine.respaced("ddim5"),
        "steps": cosine.step(t),
        "times": cosine.time([0, 6, 19]),
        "sigma max": suggest_sigma_max(randn(30, 3)),
    }


def predictions():
    """What models of every parametrization predict on every process."""
    found = {}
    for process, sde in PROCESSES.items():
        for kind in MODELS:
            one = model_on(process, kind).predict(X0, times(sde, 6))
            found[f"{kind} {process}"] = torch.stack([one.x0, one.eps, one.score, one.v])
    return found


def exact_predictions():
    """What models without a network predict, and a model on another process."""
    t = times(PROCESSES["vp"], 6)
    mixture, data = mixture_on("vp"), randn(9, 2, seed=3)
    parts = {
        "mixture": mixture.predict(X0, t),
        "empirical": EmpiricalModel(PROCESSES["vp"], data).predict(X0, t),
        "on process": ScheduleTransformedModel(model_on("ve"), EDMSDE(0.05, 10.0)).predict(X0, t),
    }
    found = {name: (one.x0, one.eps, one.score) for name, one in parts.items()}
    drawn = mixture.sample(5, generator=seeded())
    return {**found, "log_prob": mixture.log_prob(X0, t), "draws": drawn}


def time_labels():
    """What networks are told about time."""
    sde, t = PROCESSES["ve"], times(PROCESSES["ve"], 6)
    kinds = {
        "time": TimeLabel(),
        "sigma": SigmaLabel(),
        "log sigma": LogSigmaLabel(),
        "step": StepLabel(50),
        "index": IndexLabel([20.0, 3.0, 0.4, 0.02]),
    }
    found = {name: kind(sde, t) for name, kind in kinds.items()}
    model = EpsModel(network(), sde, label=kinds["log sigma"])
    return {**found, "prediction": model(X0, t)}


def losses_of_models():
    """The simple loss of every parametrization on every process, in both precisions."""
    found = {}
    for process in PROCESSES:
        for kind in MODELS:
            model = model_on(process, kind)
            parts = [ScoreMatching()(model, X0, generator=seeded(2))]
            parts += [ScoreMatching()(model.double(), X0.double(), generator=several(6))]
            found[f"{kind} {process}"] = torch.cat(parts)
    return found


def losses_of_weightings():
    """The loss with every weighting."""
    kinds = {
        "simple": SimpleWeighting(),
        "likelihood": LikelihoodWeighting(),
        "edm": EDMWeighting(),
        "min snr": MinSNRWeighting(),
    }
    return {
        f"{name} {process}": ScoreMatching(kind)(model_on(process), X0, generator=seeded())
        for name, kind in kinds.items()
        for process in ("vp", "subvp", "ve", "edm")
    }


def losses_of_times():
    """The loss with every way to draw times, and the times themselves."""
    kinds = {
        "uniform vp": UniformTimes(),
        "stratified subvp": StratifiedTimes(),
        "importance vp": ImportanceTimes(),
        "importance ve": ImportanceTimes(stratified=False),
        "discrete ddpm": DiscreteTimes(),
        "discrete smld": DiscreteTimes(),
        "log-normal edm": LogNormalTimes(),
    }
    found = {}
    for name, kind in kinds.items():
        model = model_on(name.split()[-1])
        drawn = kind.sample(model.sde, 6, generator=seeded(3))
        loss = ScoreMatching(times=kind)(model, X0, generator=seeded(4))
        found[name] = [*drawn, loss]
    objective = ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes())
    return {**found, "nats": objective.nats(model_on("vp"), X0, generator=seeded())}


def loss_second_moment_times():
    """Times that follow the losses, until they are no longer uniform."""
    sde = DDPMChain.cosine(3)
    model, kind = EpsModel(network(), sde), LossSecondMomentTimes(history=2)
    objective = ScoreMatching(times=kind)
    return [objective(model, X0, generator=seeded(i)).detach() for i in range(8)]


def loss_gradients():
    """The gradient of a loss by all weights, in both precisions."""
    found = {}
    for process, kind in (("vp", "eps"), ("ve", "raw"), ("edm", "edm"), ("ddpm", "v")):
        for dtype in (torch.float32, torch.float64):
            model = model_on(process, kind).to(dtype)
            ScoreMatching()(model, X0.to(dtype), generator=seeded()).mean().backward()
            found[f"{process} {dtype}"] = flat(p.grad for p in model.parameters())
    return found


def stable_targets():
    """The loss with the stable target: few and many dimensions, sources and classes."""
    found = {}
    for dims in (2, 20):
        data = randn(16, dims, seed=5)
        for source, reference in (("inside", data), ("outside", data[6:]), ("added", data[6:])):
            objective = ScoreMatching(target=StableTarget(source))
            loss = objective(
                model_on("ve", features=dims), data[:6], reference=reference, generator=seeded()
            )
            found[f"{source} {dims}"] = loss
    classes = randint(2, 16)
    model = EpsModel(network(20, num_classes=2), PROCESSES["vp"])
    found["classes"] = ScoreMatching(target=StableTarget())(
        model,
        data[:6],
        reference=data,
        reference_class_labels=classes,
        generator=seeded(),
        class_labels=classes[:6],
    )
    return found


def variational_losses():
    """The bound of a chain and the hybrid loss with learned variances, and their gradients."""
    found = {}
    x0 = GaussianDecoder().encode(randint(256, 6, 2))
    for variance in LEARNED:
        for name, objective in (("vlb", VLB()), ("hybrid", HybridLoss(0.01))):
            model = model_on("ddpm", variance=variance)
            loss = objective(model, x0, generator=seeded())
            loss.mean().backward()
            found[f"{name} {variance}"] = loss, flat(p.grad for p in model.parameters())
    first = torch.tensor([1, 1, 2, 3, 49, 50]) / 50
    found["steps"] = VLB()(model_on("ddpm", "x0"), x0, t=first, generator=several(6))
    return found


def noise_classifiers():
    """The loss of a classifier of noisy data, and the weights after a few steps of training."""
    sde, y = PROCESSES["vp"], randint(3, 20)
    classifier = NoiseClassifier(fill(MLP(2, out_features=3, width=8, depth=1)), sde)
    loss = classifier_loss(classifier, sde, X0, y[:6], generator=seeded())
    train_noise_classifier(
        classifier, sde, randn(20, 2), y, steps=3, batch_size=8, lr=0.01, generator=seeded()
    )
    return {"loss": loss, "weights": flat(classifier.parameters())}


def batches():
    """Windows of references over two epochs, and conditions that are dropped."""
    loader, found = ReferenceBatches(torch.arange(20.0).unsqueeze(1), 4, 8), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [flat(pair) for pair in loader]
    dropped = drop_conditions(torch.arange(12), -1, 0.4, generator=seeded())
    return {"references": torch.cat(found), "dropped": dropped}


def variances():
    """How noisy targets and gradients are."""
    sde, data = PROCESSES["ve"], randn(12, 2)
    t = torch.tensor([0.2, 0.8])
    estimates = [
        dsm_variance(sde, data, t, samples=20, generator=seeded()),
        stf_variance(sde, data, t, 4, samples=20, generator=seeded()),
        posterior_divergence(sde, data, t, samples=20, generator=seeded()),
        gradient_variance(
            model_on("ve"), ScoreMatching(), data, t, batch_size=4, pairs=3, generator=seeded()
        ),
    ]
    return [(one.value, one.stderr) for one in estimates]
