import math

import pytest
import torch
from gaussian_oracle import Classes, states

from diffusionkit import DDIM, VPSDE, DDPMChain, GaussianMixtureModel, LogSNRGrid, PCSampler
from diffusionkit.control.classifier import NoiseClassifier, classifier_loss, train_noise_classifier
from diffusionkit.control.guidance import ClassifierGuidance
from diffusionkit.interfaces import TimeSampler
from diffusionkit.models.labels import TimeLabel
from diffusionkit.networks import MLP


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_the_network_is_told(sde) -> None:
    """The state at unit variance, and the logarithm of the noise-to-signal ratio."""
    seen = []

    def network(x, label):
        seen.append((x, label))
        return x

    x, t = states(sde, 6, 3)
    alpha, sigma = sde.marginal(t)
    out = NoiseClassifier(network, sde, 0.7)(x, t)
    wanted = x / torch.sqrt(0.49 * alpha**2 + sigma**2).unsqueeze(1)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(seen[0][1], torch.log(sigma / alpha) / 4)
    NoiseClassifier(network, sde, label=TimeLabel(999.0))(x.bfloat16(), t)
    x_seen, label = seen[1]
    torch.testing.assert_close(label, (999 * t / sde.T).float())
    assert (x_seen.dtype, label.dtype) == (torch.bfloat16, torch.float32)


def test_unit_variance() -> None:
    sde = VPSDE()
    x0 = 0.3 * torch.randn(20000, 1, generator=seeded())
    for time in (0.01, 0.3, 1.0):
        t = torch.full((20000,), time)
        x = NoiseClassifier(lambda x, noise_label: x, sde, 0.3)(sde.perturb(x0, t).x, t)
        assert float(x.std()) == pytest.approx(1.0, abs=0.03)


def test_the_loss_is_the_cross_entropy(sde) -> None:
    classes = Classes(sde)
    y = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    x0 = torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64) * sde.T
    loss = classifier_loss(classes.classifier, sde, x0, y, t=t, generator=seeded(1))
    x = sde.perturb(x0, t, generator=seeded(1)).x
    for k in range(4):
        logs = classes.classifier(x[k : k + 1], t[k : k + 1])[0]
        wanted = torch.log(torch.exp(logs).sum()) - logs[y[k]]
        torch.testing.assert_close(loss[k], wanted, rtol=1e-9, atol=1e-9)


class Two(TimeSampler):
    def sample(self, sde, n, *, generator=None, device=None, dtype=None):
        return torch.full((n,), 0.25, dtype=dtype), torch.arange(n, dtype=dtype)


def test_times_and_weights() -> None:
    times = []

    def classifier(x, t):
        times.append(t)
        return torch.zeros(len(x), 8)

    x0, y = torch.zeros(5, 3), torch.arange(5)
    loss = classifier_loss(classifier, VPSDE(), x0, y, times=Two())
    assert torch.equal(times[0], torch.full((5,), 0.25))
    torch.testing.assert_close(loss, math.log(8) * torch.arange(5.0))
    loss = classifier_loss(classifier, VPSDE(), torch.zeros(4000, 1), torch.zeros(4000).long())
    torch.testing.assert_close(loss, torch.full((4000,), math.log(8)))
    assert float(times[1].mean()) == pytest.approx(0.5, abs=0.03)
    assert times[1].min() >= VPSDE().t_min


def test_a_loss_does_not_depend_on_its_batch() -> None:
    classifier = NoiseClassifier(lambda x, noise_label: x * noise_label.unsqueeze(1), VPSDE())
    x0, y = torch.randn(3, 4, generator=seeded()), torch.tensor([0, 3, 1])
    together = classifier_loss(classifier, VPSDE(), x0, y, generator=[seeded(k) for k in range(3)])
    for k in range(3):
        part = classifier_loss(
            classifier, VPSDE(), x0[k : k + 1], y[k : k + 1], generator=[seeded(k)]
        )
        torch.testing.assert_close(part, together[k : k + 1])


def test_a_trained_classifier_is_near_the_true_one_and_guides() -> None:
    sde = VPSDE()
    model = GaussianMixtureModel(sde, [[-0.5, 0.0], [0.5, 0.3]], [0.3, 0.3])
    y = torch.arange(2000) % 2
    x0 = (
        model.means[y] + 0.3 * torch.randn(2000, 2, generator=seeded(), dtype=torch.float64)
    ).float()
    torch.manual_seed(0)
    seen = []

    def watch(items):
        for item in items:
            seen.append(item)
            yield item

    classifier = NoiseClassifier(MLP(2, out_features=2, width=32, depth=1), sde)
    got = train_noise_classifier(
        classifier, sde, x0, y, steps=400, lr=5e-3, generator=seeded(), progress=watch
    )
    assert got is classifier
    assert not any(module.training for module in got.modules())
    assert len(seen) == 400
    x, t = (
        sde.perturb(x0, torch.linspace(0.01, 1, 2000), generator=seeded(3)).x,
        torch.linspace(0.01, 1, 2000),
    )
    parts = [GaussianMixtureModel(sde, model.means[k : k + 1], [0.3]) for k in (0, 1)]
    true = torch.stack([part.log_prob(x, t) for part in parts], 1).softmax(1)
    with torch.no_grad():
        error = (got(x, t).softmax(1) - true).abs().mean()
    assert error < 0.04

    asked = torch.arange(400) % 2
    guided = ClassifierGuidance(model, got)
    samples = PCSampler(guided, DDIM(), steps=30, grid=LogSNRGrid())(
        (400, 2), generator=seeded(4), y=asked
    )
    for k in (0, 1):
        mean = samples[asked == k].mean(0).double()
        torch.testing.assert_close(mean, model.means[k], rtol=0, atol=0.1)


def test_training_repeats_and_learns_in_training_mode() -> None:
    modes = []

    class Net(torch.nn.Linear):
        def forward(self, x, label):
            modes.append(self.training)
            return super().forward(x)

    x0, y = torch.randn(10, 2, generator=seeded()), torch.arange(10) % 3
    weights = []
    for k in range(2):
        torch.manual_seed(1)
        classifier = NoiseClassifier(Net(2, 3), VPSDE()).eval()
        torch.manual_seed(k)
        train_noise_classifier(
            classifier, VPSDE(), x0, y, steps=3, batch_size=4, generator=seeded(2)
        )
        weights.append(classifier.network.weight)
    assert torch.equal(*weights)
    assert modes == [True] * 6


def test_the_learning_rate_falls() -> None:
    """Where all gradients point one way, Adam's moves are as long as the rate."""
    places = []

    def watch(items):
        for item in items:
            places.append(net.bias.detach().clone())
            yield item

    net = torch.nn.Linear(1, 2)
    classifier = NoiseClassifier(lambda x, noise_label: net(x), VPSDE())
    classifier.net = net
    train_noise_classifier(
        classifier, VPSDE(), torch.ones(8, 1), torch.zeros(8).long(), steps=10, lr=1e-3,
        generator=seeded(), progress=watch,
    )  # fmt: skip
    moves = torch.stack([*places, net.bias.detach()]).diff(dim=0).abs().amax(1)
    wanted = 1e-3 * torch.arange(10, 0, -1) / 10
    torch.testing.assert_close(moves, wanted, rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda sde: NoiseClassifier(None, sde), TypeError, "network: expected a callable"),
        (lambda sde: NoiseClassifier(len, None), TypeError, "sde: expected a ForwardSDE"),
        (lambda sde: NoiseClassifier(len, sde, 0.0), ValueError, "sigma_data: expected a finite"),
        (lambda sde: NoiseClassifier(len, sde, label=3), TypeError, "label: expected a callable"),
        (lambda sde: NoiseClassifier(len, sde)(torch.zeros(2, 1), torch.zeros(3)), ValueError,
         "t: expected one time for each sample"),
        (lambda sde: NoiseClassifier(len, sde)([1.0], torch.zeros(3)), TypeError, "x: expected"),
    ],
)  # fmt: skip
def test_bad_classifiers(make, error, match) -> None:
    with pytest.raises(error, match=match):
        make(VPSDE())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"classifier": lambda x, t: x}, TypeError, "classifier: expected a Module"),
        ({"sde": None}, TypeError, "sde: expected a ForwardSDE"),
        ({"data": torch.full((6, 2), math.nan)}, ValueError, "data: expected finite values"),
        ({"data": [1.0]}, TypeError, "data: expected a tensor"),
        (
            {"class_labels": torch.zeros(5).long()},
            ValueError,
            r"labels: .* shape \(6,\), got \(5,\)",
        ),
        ({"class_labels": torch.zeros(6)}, TypeError, "labels: expected integer labels"),
        ({"class_labels": torch.full((6,), 2)}, ValueError, r"y: expected labels in \[0, 2\)"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1"),
        ({"sde": DDPMChain.cosine(100)}, ValueError, "classifier: expected the process of the"),
        ({"times": 3}, TypeError, "times: expected a TimeSampler, got int"),
        ({"generator": [seeded()]}, TypeError, "generator: expected a Generator, got list"),
        ({"lr": 0.0}, ValueError, "lr: expected a finite number > 0"),
        ({"lr": math.nan}, ValueError, "lr: expected a finite number > 0"),
    ],
)
def test_bad_training(change, error, match) -> None:
    parts = {
        "classifier": NoiseClassifier(MLP(2, width=4, depth=1), VPSDE()),
        "sde": VPSDE(),
        "data": torch.zeros(6, 2),
        "class_labels": torch.zeros(6).long(),
        "steps": 1,
    } | change
    with pytest.raises(error, match=match):
        train_noise_classifier(**parts)


@pytest.mark.parametrize(
    ("x0", "y", "t", "error", "match"),
    [
        (torch.full((2, 2), math.inf), [0, 1], None, ValueError, "x0: expected finite values"),
        (torch.zeros(2, 2).long(), [0, 1], None, TypeError, "x0: expected a floating-point"),
        (torch.zeros(2, 2), [0, 2], None, ValueError, r"y: expected labels in \[0, 2\)"),
        (torch.zeros(2, 2), [0], None, ValueError, r"y: expected one label"),
        (torch.zeros(2, 2), [0, 1], torch.ones(3), ValueError, "t: expected one time"),
        (
            torch.zeros(2, 2),
            [0, 1],
            0.5,
            TypeError,
            r"t: expected a tensor of shape \(B,\), got fl",
        ),
    ],
)
def test_bad_losses(x0, y, t, error, match) -> None:
    sde = DDPMChain.linear(100)
    with pytest.raises(error, match=match):
        classifier_loss(lambda x, t: x, sde, x0, torch.tensor(y), t=t)


def test_losses_of_two_laws_of_time_or_another_process() -> None:
    x0, y = torch.zeros(2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="expected times or t, got both"):
        classifier_loss(lambda x, t: x, VPSDE(), x0, y, t=torch.ones(2), times=Two())
    classifier = NoiseClassifier(lambda x, noise_label: x, VPSDE())
    with pytest.raises(ValueError, match=r"classifier: expected the process .* got VPSDE with"):
        classifier_loss(classifier, VPSDE(beta_max=10.0), x0, y)


def test_it_says_what_it_is() -> None:
    prediction = repr(NoiseClassifier(len, VPSDE(), 0.7, label=TimeLabel(999.0)))
    assert "sigma_data=0.7, label=TimeLabel(scale=999.0)" in prediction
