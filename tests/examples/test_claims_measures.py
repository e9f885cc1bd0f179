"""What the claims measure: evaluations, noise and variances are those that the papers mean."""

from types import SimpleNamespace

import pytest
import torch

import diffusionkit as dk


def exact(sde, low=-0.5, high=0.5):
    """Stand for a run: an exact model of two points."""
    return SimpleNamespace(model=dk.GaussianMixtureModel(sde, [[low], [high]], [0.05, 0.05]))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_samplers_of_a_budget_have_equal_evaluations_and_initial_noise(claims, scale):
    """P2000, PC1000 and C2000 of table 1: as many evaluations, and one to denoise at the end."""
    module = claims("correctors_at_equal_cost")
    run = exact(dk.VESDE(sigma_min=0.01, sigma_max=15.0))
    for predictor, evaluations, _ in module.BUDGETS[scale]:
        first = []
        for kind in module.kinds(predictor, evaluations):
            sampler = module.sampler(run, predictor, kind, 20)
            states = list(sampler.iterate((3, 1), generator=torch.Generator().manual_seed(0)))
            assert sampler.nfe == states[-1].nfe == 21, (predictor, kind)
            assert len(states) == (12 if kind == "PC" else 22)
            first.append(states[0].x)
        assert all(torch.equal(x, first[0]) for x in first)


def test_correctors_have_the_ratio_of_the_paper(claims):
    module = claims("correctors_at_equal_cost")
    run = exact(dk.VESDE(sigma_min=0.01, sigma_max=15.0))
    corrector = module.sampler(run, "reverse diffusion", "PC", 20).corrector
    assert (corrector.snr, corrector.norm, corrector.steps) == (0.16, "batch", 1)
    assert module.sampler(run, "reverse diffusion", "P", 20).corrector is None


def test_samplers_of_edm_have_equal_evaluations(claims):
    """Heun's method, with a last step by Euler's, and Euler's with as many evaluations."""
    module = claims("edm_sampling")
    run, first = exact(dk.EDMSDE()), []
    for kind in module.SAMPLERS:
        for evaluations in module.EVALUATIONS:
            sampler = module.sampler(run, kind, evaluations)
            states = list(sampler.iterate((3, 1), generator=torch.Generator().manual_seed(0)))
            assert states[-1].nfe == evaluations
            first.append(states[0].x)
    assert all(torch.equal(x, first[0]) for x in first)


def test_few_steps_of_a_chain_are_as_many_evaluations(claims):
    """The variances of a chain in few steps: betas of the few steps, or the posterior's."""
    module = claims("chains")
    run = exact(dk.DDPMChain.cosine(1000))
    for few in module.FEW:
        noise = {}
        for name, variance in module.FIXED.items():
            sampler = module.sampler(run, variance, few)
            sampler((3, 1), generator=torch.Generator().manual_seed(0))
            assert sampler.nfe == len(sampler.times) == few  # the last one denoises
            t, s = sampler.times[few // 2, None], sampler.times[few // 2 + 1, None]
            noise[name] = float(sampler.predictor.coefficients(run.model.sde, t, s).std)
        (_, sigma_s), (_, sigma_t) = run.model.sde.marginal(s), run.model.sde.marginal(t)
        large, small = noise["fixed large variance"], noise["fixed small variance"]
        assert small / large == pytest.approx(float(sigma_s / sigma_t))
        assert large == pytest.approx(float(run.model.sde.transition(s, t)[1]))


def test_variances_of_the_weighted_loss_are_those_of_a_quadrature(claims, monkeypatch):
    """Of a network that predicts no noise, the error is that of the noise alone: 1 in the mean.

    With importance sampling the loss is Z / (T - t_min) times the mean square of d normal numbers,
    of variance 2 / d.
    """
    measures = claims("measures")
    sde, d = dk.VPSDE(t_min=0.01), 16
    model = dk.EpsModel(lambda x, noise_label: 0 * x, sde)
    levels = dk.UniformDequantizer(256, -1.0, 1.0)
    parts = SimpleNamespace(dequantizer=levels, network=torch.nn.Linear(1, 1))
    images = torch.randint(256, (2000, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(measures, "test_images", lambda run, count: images[:count].byte())
    found = measures.loss_variances(SimpleNamespace(model=model, parts=parts), 2000, 2)
    t = torch.linspace(0.01, 1.0, 100_001, dtype=torch.float64)
    weight = dk.LikelihoodWeighting()(sde, t)
    mean = float(torch.trapezoid(weight, t)) / 0.99
    second = float(torch.trapezoid(weight.square(), t)) / 0.99
    assert found["mean"] == pytest.approx(mean, rel=0.03)
    assert found["importance"] == pytest.approx(2 / d * mean**2, rel=0.1)
    assert found["uniform"] == pytest.approx((1 + 2 / d) * second - mean**2, rel=0.1)


def test_curves_cross_where_the_difference_changes_sign(claims):
    """Halfway between 100 and 10,000 in logarithms is 1,000."""
    crossing = claims("maximum_likelihood").crossing
    assert crossing({100: 1.0, 10_000: -1.0}) == pytest.approx(1000)
    assert crossing({100: 3.0, 10_000: -1.0, 20_000: -1.0}) == pytest.approx(10**3.5)
    assert crossing({100: 1.0, 200: 0.5}) is crossing({100: 1.0}) is None


def test_the_exponent_of_a_power_law(claims, tmp_path):
    """Made-up numbers with 5 C^-0.25 have it, whatever the constant of a seed."""
    module, results = claims("network_widths"), claims("results")
    numbers = results.Results(tmp_path / "n.json")
    for place, name in enumerate(module.WIDTHS):
        for seed in range(2):
            key, cost = results.Results.key(name, seed, 10), 10.0 ** (place + 8)
            value = (5 + seed) * cost ** (-0.25 - 1e-3 * seed)
            numbers.add(key, module.OPERATIONS, cost, 0.0)
            numbers.add(key, module.QUALITY, {"frechet": value}, 0.0)
    bits, quality = (module.slope(numbers, label) for label in module.VALUES)
    assert bits.found is None
    assert quality.found.mean == pytest.approx(-0.2505)
    assert quality.found.half == pytest.approx(12.706 * 1e-3 / 2)
    by_width = [one for one in module.findings(numbers) if "width 16" in one.claim]
    assert by_width[1].found.mean < 0


def test_steps_to_the_same_error(claims, tmp_path):
    """Of errors that fall as powers of the steps, the share is known."""
    module, results = claims("stable_targets"), claims("results")
    numbers = results.Results(tmp_path / "numbers.json", {"scale": "small"})
    powers, share = {0: 0.5, 1: 0.3}, {0: 0.8, 1: 0.7}
    for seed, power in powers.items():
        for steps in (500, 1000, 2000):
            levels = {f"{level:g}": steps**-power / level for level in module.LEVELS}
            better = {level: error * share[seed] ** power for level, error in levels.items()}
            numbers.add(numbers.key("EDM", seed, steps), module.LOSS, levels, 1.0)
            numbers.add(numbers.key("EDM, stable target", seed, steps), module.LOSS, better, 1.0)
    found = module.fewer_steps(numbers, "EDM", "intermediate")
    assert found.a[1] == pytest.approx(75)
    assert found.found.mean == pytest.approx(-25)
    assert (found.steps, found.claimed) == (2000, -1)
    assert module.fewer_steps(numbers, "VE", "low").found is None


def test_processes_are_drawn_at_equal_steps(claims, tmp_path):
    """One that was trained for longer is not drawn beside others of fewer steps."""
    module, results = claims("maximum_likelihood"), claims("results")
    numbers = results.Results(tmp_path / "numbers.json", {"scale": "small"})
    for name, steps, mean in [("VP", 800, 3.0), ("VP", 5000, 1.0), ("sub-VP", 800, 2.0),
                              ("VE", 800, 4.0)]:  # fmt: skip
        for key in (module.BOUND, module.FLOW):
            numbers.add(numbers.key(name, 0, steps), key, {"mean": mean}, 1.0)
    _, right = module.draw(numbers).axes
    assert [list(line.get_ydata()) for line in right.lines] == [
        [mean] for mean in (3.0, 3.0, 2.0, 2.0, 4.0, 4.0)
    ]
    assert right.get_title() == "800 steps"


def test_operations_are_those_of_training(claims, tmp_path):
    """A convolution with 9 weights in 1 channel of 8x8: 2 operations each, 3 passes."""
    module = claims("network_widths")
    network = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    stand_in = torch.nn.Module()
    stand_in.forward = lambda x, label: network(x)
    settings = {"data": {"channels": 1, "size": 8}, "training": {"batch": 5}}
    run = SimpleNamespace(settings=settings, step=7, parts=SimpleNamespace(network=stand_in))
    assert module.operations(run) == 3 * (2 * 9 * 64) * 5 * 7


@pytest.fixture
def control(claims, monkeypatch):
    """The module of controllable generation, with 40 random images in [0, 1] to train on."""
    module = claims("controllable")
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "training_images", lambda run: images)
    return module


def trained_on(images):
    sde = dk.VESDE(sigma_min=0.01, sigma_max=15.0)
    settings = {"training": {"seed": 0}, "data": {"range": [0.0, 1.0], "size": 8}}
    return SimpleNamespace(
        model=dk.EmpiricalModel(sde, images),
        settings=settings,
        parts=SimpleNamespace(network=torch.nn.Linear(1, 1)),
    )


def test_what_is_known_is_imposed_and_the_rest_is_scored(control, monkeypatch):
    """All samples have the measurement; the score is that of images in [-1, 1], hidden part."""
    monkeypatch.setattr(control, "STEPS", 4)
    images = control.training_images(None)
    run, truth = trained_on(images), images[:3]
    for make in control.ALL.values():
        task = make(8)
        members = control.draw_members(run, truth, task)
        assert members.shape == (3, control.MEMBERS, 1, 8, 8)
        known = task.operator(truth)[:, None].expand_as(task.operator(members))
        assert torch.allclose(task.operator(members), known, atol=1e-5)
        exact = control.by_training_set(run, truth, task, 1e-3)
        assert control.score(run, exact, truth, task) == 0
        wide = control.by_training_set(run, truth, task, 1e3)
        assert control.score(run, wide, truth, task) > 1
        hidden = torch.zeros_like(members) + truth[:, None] + 0.25 * task.hidden
        value = 2 * 0.25 * float(task.hidden.sum()) ** 0.5
        assert control.score(run, hidden, truth, task) == pytest.approx(value)
        if not task.hidden.all():
            changed = truth[:, None] + 5.0 * (1 - task.hidden) + torch.zeros_like(members)
            assert control.score(run, changed, truth, task) == 0


@pytest.mark.parametrize(
    ("method", "share"),
    [("RePaint", 1e-4), ("more evaluations", 1e-4), ("PiGDM", 0.2), ("MMPS", 0.2)],
)
def test_other_methods_have_what_is_known(control, monkeypatch, method, share):
    """Guidance nearly, since its measurements have noise."""
    monkeypatch.setattr(control, "STEPS", 20)
    images = control.training_images(None)
    run, truth = trained_on(images), images[:2]
    task = control.right_half(8)
    members = control.draw_members(run, truth, task, method)
    off = (task.operator(members) - task.operator(truth)[:, None]).abs().mean()
    free = dk.PCSampler(run.model, dk.ReverseDiffusion(), steps=20)
    other = free((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert off < share * (task.operator(other) - task.operator(truth)).abs().mean()


def test_findings_compare_the_network_with_little_and_with_the_best_noise(control, claims):
    results = claims("results")
    table = {"network": 2.0, "0.05": 3.0, "0.1": 2.5, "0.2": 1.5, "0.5": 1.8, "1": 2.2, "2": 4.0}
    assert control.of_network("x")({"x": table}) == 2.0
    assert control.of_training_set("x")({"x": table}) == 1.5
    assert control.of_training_set("x", 0.05)({"x": table}) == 3.0
    kept = results.Results(control.CLAIM.path(results.FOLDER, "small"))
    assert [one.found is not None for one in control.findings(kept)[:4]] == [True] * 4


class TrueClassifier(torch.nn.Module):
    """The exact classes of noisy images, of a set with classes, for VE."""

    def __init__(self, sde, images, labels):
        super().__init__()
        self.sde, self.images, self.labels = sde, images.flatten(1), labels

    def forward(self, x, t):
        sigma = self.sde.marginal(t)[1].reshape(-1, 1)
        logits = -0.5 * (torch.cdist(x.flatten(1), self.images) / sigma) ** 2
        classes = [logits[:, self.labels == k].logsumexp(1) for k in range(16)]
        return torch.stack(classes, 1).clamp_min(-1e6)


def test_shares_of_classes(claims, monkeypatch):
    """The exact model of images of four classes, and the true classifier to guide and to judge."""
    module = claims("class_guidance")
    monkeypatch.setattr(module, "SAMPLES", 10)
    monkeypatch.setattr(module, "STEPS", 30)
    sde = dk.VESDE(sigma_min=0.01, sigma_max=15.0)
    levels = torch.randint(256, (40, 1, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(40) % 4 + 2
    truth = TrueClassifier(sde, levels / 255, labels)
    monkeypatch.setattr(module, "labeled", lambda run, part: (levels, labels))
    monkeypatch.setattr(module, "NoiseClassifier", lambda *given: truth)
    monkeypatch.setattr(module, "train_noise_classifier", lambda *given, **options: None)

    def judge(images, labels, seed):
        return lambda x, label: truth((x + 1) / 2, torch.full((len(x),), 0.1))

    monkeypatch.setattr(module, "judge", judge)
    run = trained_on(levels / 255)
    found = module.class_shares(run)
    assert found["training"] == found["test"] == 1
    assert found["unconditional"] < 0.5
    assert found["guided"] > 0.9
    assert found["training distance"] == pytest.approx(0, abs=1e-9)
    assert found["guided distance"] < found["unconditional distance"]


def test_the_judge_learns_classes(claims, monkeypatch):
    """Bright and dark images are told apart after a few steps."""
    module = claims("class_guidance")
    monkeypatch.setattr(module, "TRAINING", 15)
    images = torch.cat([torch.full((30, 1, 8, 8), -0.8), torch.full((30, 1, 8, 8), 0.8)])
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) // 30
    found = module.judge(images, labels, 0)(images, torch.zeros(60)).argmax(1)
    assert (found == labels).all()


def test_checks_change_one_thing(control, monkeypatch):
    """Each method's model, predictor, corrector and number of evaluations."""
    images = control.training_images(None)
    run, task = trained_on(images), control.right_half(8)
    run.model = dk.GaussianMixtureModel(run.model.sde, images[:2].flatten(1), [1.0, 1.0])
    found = {}
    for method in (control.NETWORK, *control.CHECKS):
        sampler = control.sampler_of(run, task, images[:3], method)
        parts = (sampler.model, sampler.predictor, sampler.corrector)
        travel = sampler.time_travel
        each = (1 if travel is None else travel.repeats) * (1 if parts[2] is None else 2)
        found[method] = *(type(part).__name__ for part in parts), each * sampler.steps
    mixture = "GaussianMixtureModel"
    assert found == {
        "network": (mixture, "ReverseDiffusion", "Langevin", 100),
        "training set": ("EmpiricalModel", "ReverseDiffusion", "Langevin", 100),
        "RePaint": (mixture, "Ancestral", "NoneType", 100),
        "PiGDM": ("PseudoinverseGuidance", "Ancestral", "NoneType", 50),
        "MMPS": ("LinearGaussianGuidance", "Ancestral", "NoneType", 50),
        "more evaluations": (mixture, "ReverseDiffusion", "Langevin", 400),
    }


def test_checks_are_scored_by_task(control, monkeypatch):
    images = control.training_images(None)
    monkeypatch.setattr(control, "IMAGES", 2)
    monkeypatch.setattr(control, "STEPS", 10)
    monkeypatch.setattr(control, "test_images", lambda run, count: (255 * images[:count]).byte())
    found = control.check(trained_on(images), "RePaint")
    assert set(found) == set(control.ALL)
    assert 0 < found["right half"] < 0.1 < found["means of blocks"]  # it finds the image


def test_colors_of_gray_images(claims, monkeypatch):
    """Gray images have the distance of their colors; the exact model of few images has none."""
    module, control = claims("colorization"), claims("controllable")
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(control, "training_images", lambda run: images)
    monkeypatch.setattr(control, "STEPS", 60)
    for name in ("controllable", "colorization"):
        monkeypatch.setattr(claims(name), "IMAGES", 3)
        monkeypatch.setattr(
            claims(name), "test_images", lambda run, count: (255 * images[:count]).round()
        )
    run = trained_on(images)
    truth = (255 * images[:3]).round() / 255
    colors = 2 * (truth - truth.mean(1, keepdim=True))
    assert module.gray_score(run) == pytest.approx(float(colors.flatten(1).norm(dim=1).mean()))
    found = module.color_scores(run)["colors"]
    assert found["0.05"] < 0.2
    assert found["network"] < 0.2 * module.gray_score(run)
