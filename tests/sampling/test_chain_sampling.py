"""Sampling along chains: the released code's steps, and the processes that chains discretise."""

import itertools
import math

import pytest
import torch
from support import seeded

from diffusionkit import DDIM, VESDE, VPSDE, Ancestral, PCSampler, ReverseDiffusion, StepLabel
from diffusionkit.models import EpsModel, GaussianMixtureModel
from diffusionkit.models.denoised import Clip, DenoisedModel
from diffusionkit.sampling.encode import ddim_encode
from diffusionkit.sde.ddpm_chain import DDPMChain
from diffusionkit.sde.smld_chain import SMLDChain

# One step of independent float64 code in the conventions of the released one, for the schedule,
# its length, the respacing, the number of the step and whether the data are clipped. "posterior"
# and "model" are the ancestral sampler with the small and the learned variance, "reverse" is the
# step to the next time of DDIM's encoding.
X, EPS = [0.8, -1.3, 0.05, 1.9], [0.5, -0.7, 0.3, 1.1]
NOISE, V = [0.25, -1.0, 0.6, -0.4], [-1.0, 0.3, 1.0, 1.5]
REFERENCE = {
    ("linear", 1000, "1000", 1, True): {
        "posterior": [0.7978505265112, -1.143797118369, 0.05200758738185, 1.406283819524],
        "model": [0.7978505265112, -1.145952660999, 0.05414732251989, 1.404403879985],
        "ddim 0": [0.7976328812105, -1.202326445168, 0.04855394362439, 1.606931036923],
        "ddim 0.5": [0.7982026456837, -1.191718535391, 0.05055733059682, 1.562564017456],
        "ddim 1": [0.7978505265112, -1.143797118369, 0.05200758738185, 1.406283819524],
        "reverse": [0.8020130377121, -1.383651487005, 0.05123788924397, 2.151032939481],
    },
    ("linear", 1000, "1000", 500, True): {
        "posterior": [0.8234056252603, -1.395650063376, 0.1072485858088, 1.851753783387],
        "model": [0.8234056252603, -1.395678012205, 0.107274386664, 1.851732281521],
        "ddim 0": [0.8011902366612, -1.300975871241, 0.04866976341236, 1.900718632737],
        "ddim 0.5": [0.8130115683553, -1.349711372984, 0.07835373022826, 1.878456335674],
        "ddim 1": [0.8234056252603, -1.395650063376, 0.1072485858088, 1.851753783387],
        "reverse": [0.7988121956712, -1.29902473403, 0.05132548216726, 1.89927978006],
    },
    ("linear", 1000, "1000", 500, False): {
        "posterior": [0.8238542942167, -1.399474924971, 0.1072485858088, 1.857945469757],
        "model": [0.8238542942167, -1.3995028738, 0.107274386664, 1.857923967891],
        "ddim 0": [0.8014151862937, -1.302893546173, 0.04866976341236, 1.903822965128],
        "ddim 0.5": [0.8132923329513, -1.352104865347, 0.07835373022826, 1.882330921374],
        "ddim 1": [0.8238542942167, -1.399474924971, 0.1072485858088, 1.857945469757],
        "reverse": [0.7985880318007, -1.297113757647, 0.05132548216726, 1.896186291282],
    },
    ("linear", 1000, "1000", 999, True): {
        "posterior": [0.8274426185999, -1.42848293123, 0.1342218612231, 1.824462320997],
        "model": [0.8274426185999, -1.428482969087, 0.1342218961686, 1.824462291876],
        "ddim 0": [0.8000641704161, -1.300063964498, 0.04993547952321, 1.900063717396],
        "ddim 0.5": [0.8157551488818, -1.367536313232, 0.0922208046901, 1.867039217759],
        "ddim 1": [0.8274426185999, -1.42848293123, 0.1342218612231, 1.824462320997],
        "reverse": [0.7936631975218, -1.293673287402, 0.05635395527389, 1.893685395257],
    },
    ("linear", 1000, "1000", 0, True): {
        "posterior": [0.7950397529816, -1, 0.04700235017627, 1],
        "model": [0.7950397529816, -1, 0.04700235017627, 1],
        "ddim 0": [0.7950397529815, -1, 0.04700235017627, 1],
        "ddim 0.5": [0.7950397529815, -1, 0.04700235017627, 1],
        "ddim 1": [0.7950397529815, -1, 0.04700235017627, 1],
        "reverse": [0.8023669768529, -1.444842975323, 0.05144596966753, 2.334600549352],
    },
    ("cosine", 4000, "4000", 1, True): {
        "posterior": [0.7994275305481, -1.149964807703, 0.05066133530716, 1.442285952848],
        "model": [0.7994275305481, -1.1505441572, 0.05123203528318, 1.441787379637],
        "ddim 0": [0.7993365203369, -1.210521293134, 0.04959972576124, 1.631559685907],
        "ddim 0.5": [0.7995132206019, -1.197829875603, 0.05020924763015, 1.58968212045],
        "ddim 1": [0.7994275305469, -1.149964807701, 0.05066133530709, 1.442285952845],
        "reverse": [0.8005194909164, -1.370192969358, 0.05031394625376, 2.110584693042],
    },
    ("cosine", 4000, "4000", 3998, True): {
        "posterior": [0.6170905634163, -1.516609357054, 0.5440306822767, 0.6041739846419],
        "model": [0.6170905634163, -1.516609485229, 0.5440308005916, 0.6041738860461],
        "ddim 0": [0.8003894305602, -1.300389316712, 0.04961037589726, 1.900389180093],
        "ddim 0.5": [0.8297912638332, -1.605244509639, 0.3044489022904, 1.539859442216],
        "ddim 1": [0.6170905634163, -1.516609357054, 0.5440306822767, 0.6041739846419],
        "reverse": [0.7996227685757, -1.299622806487, 0.050377295874, 1.899622851981],
    },
    ("cosine", 4000, "4000", 3998, False): {
        "posterior": [1.066506212686, -2.416025040487, 0.1696151259842, 1.80358972121],
        "model": [1.066506212686, -2.416025168662, 0.1696152442991, 1.803589622614],
        "ddim 0": [1.099999878568, -1.899999802676, -0.2000000075955, 2.699999711602],
        "ddim 0.5": [1.158946945793, -2.263983881814, 0.03022389929379, 2.41832129677],
        "ddim 1": [1.066506212686, -2.416025040487, 0.1696151259842, 1.80358972121],
        "reverse": [0.5094868341426, -0.718973667588, 0.2920943065469, 1.125298223838],
    },
    ("cosine", 4000, "50", 0, True): {
        "posterior": [0.7984334435591, -1, 0.04905794496874, 1],
        "model": [0.7984334435591, -1, 0.04905794496874, 1],
        "ddim 0": [0.7984334435591, -1, 0.04905794496874, 1],
        "ddim 0.5": [0.7984334435591, -1, 0.04905794496874, 1],
        "ddim 1": [0.7984334435591, -1, 0.04905794496874, 1],
        "reverse": [0.8192044408719, -5.108073743302, 0.06191864155803, 13.32593771339],
    },
    ("cosine", 4000, "50", 1, True): {
        "posterior": [0.7801050773628, -1.004730358908, 0.03907638453556, 1.003540164693],
        "model": [0.7801050773628, -1.018765078799, 0.06294027677836, 0.9717769686341],
        "ddim 0": [0.7807778579029, -1.021966163677, 0.03807037272468, 1.065773167701],
        "ddim 0.5": [0.7809602348908, -1.020605772568, 0.0388846389849, 1.056384544222],
        "ddim 1": [0.7801050773628, -1.004730358908, 0.03907638453556, 1.003540164693],
        "reverse": [0.8146332212873, -1.523634361616, 0.05960224148364, 2.573336447172],
    },
    ("cosine", 4000, "50", 25, True): {
        "posterior": [0.8420469422493, -1.508913207502, 0.169815759709, 1.717184006991],
        "model": [0.8420469422493, -1.513850281909, 0.1743980913155, 1.713350403839],
        "ddim 0": [0.8031651283489, -1.303777720386, 0.03792992442482, 1.885365497328],
        "ddim 0.5": [0.8280877060895, -1.415581160238, 0.1071618445412, 1.819613921372],
        "ddim 1": [0.8420469422493, -1.508913207502, 0.169815759709, 1.717184006991],
        "reverse": [0.7959842229594, -1.294856816701, 0.06216820194241, 1.91288739419],
    },
    ("cosine", 4000, "50", 25, False): {
        "posterior": [0.8420469422493, -1.521517461424, 0.169815759709, 1.767876014479],
        "model": [0.8420469422493, -1.526454535831, 0.1743980913155, 1.764042411327],
        "ddim 0": [0.8031651283489, -1.310278731933, 0.03792992442482, 1.911511378558],
        "ddim 0.5": [0.8280877060895, -1.423572435785, 0.1071618445412, 1.851753372258],
        "ddim 1": [0.8420469422493, -1.521517461424, 0.169815759709, 1.767876014479],
        "reverse": [0.7959842229594, -1.288275632445, 0.06216820194241, 1.886419072968],
    },
    ("cosine", 4000, "50", 49, True): {
        "posterior": [0.2821234612824, -1.031933337146, 0.5677702374642, -0.3671209471309],
        "model": [0.2821234612824, -1.032265003533, 0.5680764184035, -0.3673761141953],
        "ddim 0": [0.8315222518646, -1.331267101063, 0.01804399177257, 1.930960920101],
        "ddim 0.5": [0.8493351388211, -1.656935493376, 0.3111939188115, 1.476642851185],
        "ddim 1": [0.2821234612825, -1.031933337146, 0.5677702374642, -0.3671209471305],
        "reverse": [0.7999876794257, -1.299987679464, 0.0500123206388, 1.899987679509],
    },
}  # fmt: skip
MOVES = {
    "posterior": Ancestral(),
    "model": Ancestral(variance="model"),
    "ddim 0": DDIM(),
    "ddim 0.5": DDIM(eta=0.5),
    "ddim 1": DDIM(eta=1.0),
}
MEAN, STD = 0.7, 0.4


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def row(values):
    return f64(values)


def said_by(chain, clip, variance="learned_range"):
    both = torch.cat([row(EPS), row(V)], 1)
    output = {"learned_range": both, "learned": both}.get(variance, row(EPS))
    model = EpsModel(lambda x, noise_label: output.expand(len(x), -1), chain, variance=variance)
    return DenoisedModel(model, Clip(-1.0, 1.0)) if clip else model


def times_of(schedule, steps, spec, i):
    """The times of the step asked for, of the one before, nearer to the data, and of the next."""
    chain = getattr(DDPMChain, schedule)(steps)
    grid = torch.cat([f64(0.0), chain.respaced(spec).flip(0)])
    return chain, grid[i + 1 : i + 2], grid[i : i + 1], grid[i + 2 : i + 3]


@pytest.fixture
def given_noise(monkeypatch):
    draw = "diffusionkit.sampling.predictors.step_noise"
    monkeypatch.setattr(draw, lambda x, *rest: row(NOISE).clone())


@pytest.mark.parametrize("case", REFERENCE, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_one_step_is_the_released_codes(case, name, given_noise) -> None:
    *which, clip = case
    chain, t, s, _ = times_of(*which)
    step = MOVES[name].step(said_by(chain, clip), row(X), t, s)
    torch.testing.assert_close(step.x, row(REFERENCE[case][name]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", REFERENCE, ids=str)
def test_one_step_of_encoding_is_the_released_codes(case) -> None:
    *which, clip = case
    chain, t, _, following = times_of(*which)
    model = said_by(chain, clip)
    if len(following):
        encoded = ddim_encode(model, row(X), grid=torch.cat([following, t]))
    else:  # beyond T all is noise
        encoded = model.predict(row(X), t).eps
    torch.testing.assert_close(encoded, row(REFERENCE[case]["reverse"]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spec", ["ddim20", 20, [5, 15]])
@pytest.mark.parametrize("name", MOVES)
def test_a_respaced_run_is_the_chain_of_new_betas(spec, name) -> None:
    """A sub-grid of the chain, and the short chain with betas 1 - abar_i / abar_{i-1}."""
    chain = DDPMChain.cosine(400)
    grid = chain.respaced(spec)
    network = lambda x, noise_label: torch.cat([0.5 * x, torch.tanh(x)], 1)  # noqa: E731
    short = DDPMChain.from_alphas_bar(chain.marginal(grid.flip(0))[0] ** 2)
    x = torch.randn((6, 3), generator=seeded(1), dtype=torch.float64)
    runs = [
        PCSampler(EpsModel(network, sde, variance="learned_range"), MOVES[name], grid=times)(
            x, generator=seeded()
        )
        for sde, times in ((chain, grid), (short, short.respaced(20)))
    ]
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


def test_the_network_is_told_the_original_step() -> None:
    chain, told = DDPMChain.linear(100), []

    def network(x, label):
        told.append(float(label[0]))
        return x

    model = EpsModel(network, chain, label=StepLabel(100))
    PCSampler(model, Ancestral(), grid=chain.respaced("ddim5"))((1, 2))
    assert told == pytest.approx([80, 60, 40, 20, 0], abs=1e-9)


def test_a_log_variance_is_taken_as_it_is(given_noise) -> None:
    chain, t, s, _ = times_of("linear", 1000, "50", 7)
    step = Ancestral(variance="model").step(said_by(chain, False, "learned"), row(X), t, s)
    torch.testing.assert_close(step.x - step.mean, (row(V) / 2).exp() * row(NOISE))


def test_no_noise_where_none_is_left(given_noise) -> None:
    """Samples of a batch may stand at different times."""
    chain = DDPMChain.linear(10, beta_max=5.0)
    x, t, s = row(X).repeat(2, 1), f64(0.1, 0.2), f64(0.0, 0.1)
    for variance in ("learned", "learned_range"):
        step = Ancestral(variance="model").step(said_by(chain, False, variance), x, t, s)
        assert torch.equal(step.x[0], step.mean[0])
        assert ((step.x[1] - step.mean[1]).abs() > 1e-3).all()


@pytest.mark.parametrize("variance", [None, "fixed_small"])
def test_a_model_without_a_variance(variance) -> None:
    chain, t, s, _ = times_of("linear", 1000, "50", 7)
    with pytest.raises(ValueError, match=r"states a variance, such as .*learned_range.*, got none"):
        Ancestral(variance="model").step(said_by(chain, False, variance), row(X), t, s)
    with pytest.raises(ValueError, match='"posterior", "forward" or "model", got \'large\''):
        Ancestral(variance="large")


def test_a_learned_variance_in_other_shapes_and_dtypes() -> None:
    chain = DDPMChain.linear(100)
    for dtype in (torch.float32, torch.bfloat16):
        network = lambda x, noise_label: torch.cat([x, x], 1)  # noqa: E731
        model = EpsModel(network, chain, variance="learned_range")
        sampler = PCSampler(model, Ancestral(variance="model"), grid=chain.respaced(10))
        x = sampler((2, 3, 4, 4), generator=seeded(), dtype=dtype)
        assert x.dtype == dtype
        assert torch.isfinite(x).all()


def law_after(sde, predictor, times):
    """The mean and variance after all moves, for N(MEAN, STD^2) data and its exact score."""
    alpha, sigma = (c.tolist() for c in sde.marginal(times))
    mean, variance = alpha[0] * MEAN, (alpha[0] * STD) ** 2 + sigma[0] ** 2
    move = predictor.coefficients(sde, times[:-1], times[1:])
    columns = (c.tolist() for c in (move.x, move.x0, move.std))
    for a, s, by_x, by_x0, std in zip(alpha, sigma, *columns, strict=False):
        gain = a * STD**2 / ((a * STD) ** 2 + s**2)  # E[x0 | x] = MEAN + gain (x - a MEAN)
        slope, offset = by_x + by_x0 * gain, by_x0 * (1 - gain * a) * MEAN
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return f64(mean, math.sqrt(variance))


PAIRS = {
    "ddpm": (DDPMChain.linear, VPSDE(), 0.05),
    "smld": (SMLDChain.geometric, VESDE(sigma_min=0.01, sigma_max=50.0), 0.5),
}


@pytest.mark.parametrize("predictor", [Ancestral(), ReverseDiffusion(), DDIM(eta=1.0)], ids=repr)
@pytest.mark.parametrize("kind", PAIRS)
def test_samples_of_chain_and_limit_agree_to_one_over_their_steps(kind, predictor) -> None:
    make, limit, end = PAIRS[kind]

    def difference(steps):
        times = torch.arange(steps, steps * end - 1, -1, dtype=torch.float64) / steps
        laws = [law_after(sde, predictor, times) for sde in (make(steps), limit)]
        return float((laws[0] - laws[1]).abs().max())

    differences = [difference(steps) for steps in (1000, 2000, 4000)]
    assert differences[0] < 0.01
    for coarse, fine in itertools.pairwise(differences):
        assert coarse / fine == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("predictor", [Ancestral(), ReverseDiffusion(), DDIM(eta=0.5)], ids=repr)
def test_the_levels_of_smld_are_ve_on_its_papers_grid(predictor) -> None:
    """Sample for sample: step i of N sits where VE is at i / (N - 1)."""
    network, chain = torch.nn.Hardtanh(), SMLDChain.geometric(40)
    runs = [
        PCSampler(EpsModel(lambda x, noise_label: network(x / 9), sde), predictor, grid=grid)(
            (5, 3), generator=seeded(), dtype=torch.float64
        )
        for sde, grid in (
            (chain, chain.respaced(40)),
            (VESDE(0.01, 50.0), torch.linspace(1, 0, 40, dtype=torch.float64)),
        )
    ]
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", [DDPMChain.linear(1000), SMLDChain.geometric(1000)], ids=repr)
def test_encoding_finds_the_noise_that_ddim_decodes(sde) -> None:
    """On Gaussian data the flow keeps the number of standard deviations from the mean."""
    model = GaussianMixtureModel(sde, [[MEAN]], [STD])
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    errors = []
    for steps in (100, 200, 400):
        grid = sde.time(sde.subsequence(steps)[::-1])
        alpha, sigma = (float(c) for c in sde.marginal(grid[-1:]))
        x = alpha * MEAN + math.hypot(alpha * STD, sigma) * z
        noise = ddim_encode(model, x, grid=grid)
        alpha, sigma = (float(c) for c in sde.marginal(grid[:1]))
        ideal = (noise - alpha * MEAN) / math.hypot(alpha * STD, sigma)
        back = PCSampler(model, DDIM(), grid=grid, denoise=False)(noise)
        errors.append((float((ideal - z).abs().max()), float((back - x).abs().max())))
    for coarse, fine in itertools.pairwise(errors):
        for before, after in zip(coarse, fine, strict=True):
            assert before / after == pytest.approx(2.0, rel=0.25)
    assert max(errors[-1]) < 0.1


def test_encoding_runs_the_model_as_samplers_do() -> None:
    chain, seen = DDPMChain.linear(50), []

    def network(x, label, class_labels=None):
        seen.append(
            (model.training, torch.is_grad_enabled(), float(label[0]), int(class_labels[0]))
        )
        return x

    model = EpsModel(network, chain, label=lambda sde, t: t)
    steps = []
    x = ddim_encode(
        model,
        torch.ones(2, 3, requires_grad=True),
        steps=2,
        class_labels=torch.tensor([3, 3]),
        progress=lambda items: steps.extend(items) or items,
    )
    assert not x.requires_grad
    assert model.training
    assert [row[:2] for row in seen] == [(False, False)] * 2
    assert [row[2] for row in seen] == pytest.approx([0.02, 0.51])
    assert seen[0][3] == 3
    assert len(steps) == 2


def test_encoding_bad_input() -> None:
    model = GaussianMixtureModel(DDPMChain.linear(50), [[MEAN]], [STD])
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"time with noise.* = 0.02, got 0"):
        ddim_encode(model, x, grid=f64(1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="strictly decreasing"):
        ddim_encode(model, x, grid=f64(0.1, 0.5))
    with pytest.raises(ValueError, match="steps"):
        ddim_encode(model, x, steps=0)
    with pytest.raises(ValueError, match="x: expected finite"):
        ddim_encode(model, x / 0)
    with pytest.raises(TypeError, match="model: expected a ScoreModel"):
        ddim_encode(lambda x, t: x, x)
