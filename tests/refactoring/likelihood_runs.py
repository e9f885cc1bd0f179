"""Runs of likelihoods: bounds, densities, dequantizers, decoders and bits per dimension."""

import torch
from run_parts import (
    LEARNED,
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
    NELBO,
    ChainNELBO,
    DiscreteNELBO,
    EpsModel,
    ExactDivergence,
    GaussianDecoder,
    Hutchinson,
    LearnedSDE,
    LevelDecoder,
    LogSigmaLabel,
    ODELikelihood,
    UniformDequantizer,
    VariationalDequantizer,
    bits_per_dim,
    bits_per_step,
    evaluate_bits_per_dim,
    variance_minimizing_backward,
)

X = 0.5 * randn(4, 2)
ANY = ("vp", "subvp", "ve", "edm")


def ode_likelihood():
    """The density of the flow with every divergence, its latent codes and evaluations."""
    kinds = {
        "default": None,
        "gaussian": Hutchinson(2, "gaussian"),
        "exact": ExactDivergence(),
    }
    found = {}
    for process, name in zip(ANY, (*kinds, "exact"), strict=True):
        likelihood = ODELikelihood(
            mixture_on(process), divergence=kinds[name], rtol=1e-3, atol=1e-3
        )
        result = likelihood(X, generator=several(4))
        found[f"{name} {process}"] = result.log_prob, result.latent, result.nfe, result.nats
    fixed = {"method": "rk4", "options": {"step_size": 0.3}, "divergence": ExactDivergence()}
    result = ODELikelihood(model_on("vp"), **fixed)(X, generator=seeded())
    return {**found, "fixed": (result.log_prob, result.latent)}


def bounds():
    """Every term of the bound in continuous time."""
    found = {}
    for process in ANY:
        for samples, divergence in ((1, None), (4, None), (2, Hutchinson())):
            for generator in (seeded(), several(4)):
                likelihood = NELBO(model_on(process), samples=samples, divergence=divergence)
                bound = likelihood(X, generator=generator)
                parts = [bound.nats, bound.prior, bound.path, bound.drift, bound.smallest_time]
                name = f"{process} {samples} {type(generator).__name__}"
                found[name] = torch.stack(parts)
    return found


def chain_bounds():
    """Every term of a chain's bound, and what each step costs on average."""
    images, found = randint(256, 4, 2), {}
    for name, options in (
        ("posterior", {}),
        ("learned", {"variance": "learned"}),
        ("range", {"variance": "learned_range"}),
    ):
        likelihood = ChainNELBO(model_on("ddpm", **options), steps_at_once=7)
        parts = [likelihood(some, generator=several(2)) for some in images.split(2)]
        bits = bits_per_step(parts, 2)
        found[name] = {
            "terms": torch.cat([part.terms for part in parts]),
            "prior": torch.cat([part.prior for part in parts]),
            "bits": (bits.prior, bits.prior_stderr, bits.terms, bits.terms_stderr),
        }
    plain = ChainNELBO(model_on("smld"), GaussianDecoder(256, cdf="tanh"), clip=False)
    return {**found, "smld": plain(images, generator=seeded()).nats}


def discrete_bounds():
    """Every term of the bound for integers, and the gradients of model and schedule."""
    images, found = randint(16, 4, 2), {}
    for process in ANY:
        for steps in (None, 10):
            likelihood = DiscreteNELBO(model_on(process), LevelDecoder(16), steps=steps)
            for generator in (seeded(), several(4)):
                bound = likelihood(images, generator=generator)
                parts = torch.stack([bound.reconstruction, bound.prior, bound.diffusion])
                found[f"{process} {steps} {type(generator).__name__}"] = parts
    sde = fill(LearnedSDE(hidden=8, learn_ends=True))
    model = EpsModel(network(), sde, label=LogSigmaLabel())
    bound = DiscreteNELBO(model, LevelDecoder(16))(images, generator=seeded())
    variance_minimizing_backward(bound.nats.mean() / 2, bound.diffusion / 2, sde.interior())
    return {**found, "gradients": flat(p.grad for p in model.parameters())}


def decoders():
    """The likelihood of integers by both decoders."""
    images, sde = randint(256, 6, 3), PROCESSES["vp"]
    x = GaussianDecoder().encode(images)
    t = times(sde, 6, torch.float64) * 0.01
    noisy, spread = x + 0.1 * randn(6, 3), randn(6, 3, seed=2) - 4
    found = {
        name: GaussianDecoder(cdf=name).log_prob(x, noisy, spread) for name in ("exact", "tanh")
    }
    levels = LevelDecoder()
    return {**found, "levels": levels.log_prob(images, noisy, *sde.marginal(t))}


def dequantizers():
    """Points in the bins of integers, with their densities, and the gradient of a flow."""
    images, found = randint(8, 4, 3, 2, 2), {}
    found["uniform"] = _points(UniformDequantizer(8), images, several(4))
    for squash in ("sigmoid", "normal"):
        flow = VariationalDequantizer(
            3, 2, 8, steps=2, width=8, components=2, context_width=8, blocks=1, heads=2,
            squash=squash,
        )  # fmt: skip
        points = _points(flow, images, seeded())  # the first call sets the scales
        fill(flow, 0.05).eval()
        drawn = _points(flow, images, several(4))
        density = flow.log_prob_of(drawn[0], images)
        density.sum().backward()
        gradients = flat(p.grad for p in flow.parameters() if p.grad is not None)
        found[squash] = points, drawn, density, gradients
    return found


def _points(dequantizer, images, generator):
    drawn = dequantizer(images, generator=generator)
    return drawn.x, drawn.log_prob


def bits():
    """Bits per dimension of a data set by every kind of likelihood."""
    images = randint(8, 7, 2)
    points = {"dequantizer": UniformDequantizer(8), "batch_size": 3, "draws": 2}
    flow = ODELikelihood(mixture_on("vp"), rtol=1e-3, atol=1e-3)
    runs = {
        "bound": (NELBO(mixture_on("vp"), samples=2), points),
        "flow": (flow, points),
        "integers": (DiscreteNELBO(model_on("ve"), LevelDecoder(8)), {"seed": 3}),
        "chain": (ChainNELBO(model_on("ddpm"), GaussianDecoder(8)), {"seed": 4}),
    }
    found = {"plain": bits_per_dim(torch.arange(4.0), (2, 3))}
    for name, (likelihood, options) in runs.items():
        result = evaluate_bits_per_dim(likelihood, images, progress=False, **options)
        found[name] = result.bits, result.mean, result.stderr
    return found


def learned_models():
    """What models with a learned variance predict."""
    found = {}
    for variance in LEARNED:
        one = model_on("ddpm", variance=variance).predict(X, times(PROCESSES["ddpm"], 4))
        spread = one.log_var if variance == "learned" else one.log_var_fraction
        found[variance] = one.x0, one.eps, spread
    return found
