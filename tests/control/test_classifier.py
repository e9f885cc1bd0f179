"""Classifiers of noisy data: their inputs, loss and training."""

import math

import pytest
import torch
from support import seeded
from support.gaussian_oracle import Classes, randn64, random_states

from diffusionkit import DDIM, VPSDE, DDPMChain, GaussianMixtureModel, LogSNRGrid, PCSampler
from diffusionkit.control.classifier import NoiseClassifier, classifier_loss, train_noise_classifier
from diffusionkit.control.guidance import ClassifierGuidance
from diffusionkit.interfaces import TimeSampler
from diffusionkit.models.labels import TimeLabel
from diffusionkit.networks import MLP


def test_inputs_of_the_network(sde) -> None:
    """The state at unit variance, and the logarithm of the noise-to-signal ratio."""
    seen = []

    def network(x, label):
        seen.append((x, label))
        return x

    x, t = random_states(sde, 6, 3)
    alpha, sigma = sde.marginal(t)
    out = NoiseClassifier(network, sde, 0.7)(x, t)
    wanted = x / torch.sqrt(0.49 * alpha**2 + sigma**2).unsqueeze(1)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(seen[0][1], torch.log(sigma / alpha) / 4)
    NoiseClassifier(network, sde, label=TimeLabel(999.0))(x.bfloat16(), t)
    x_seen, label = seen[1]
    torch.testing.assert_close(label, (999 * t / sde.T).float())
    assert (x_seen.dtype, label.dtype) == (torch.float32, torch.float32)


def test_network_inputs_have_unit_variance() -> None:
    sde = VPSDE()
    x0 = 0.3 * torch.randn(20000, 1, generator=seeded())
    for time in (0.01, 0.3, 1.0):
        t = torch.full((20000,), time)
        x = NoiseClassifier(lambda x, noise_label: x, sde, 0.3)(sde.perturb(x0, t).x, t)
        assert float(x.std()) == pytest.approx(1.0, abs=0.03)


def test_loss_is_the_cross_entropy(sde) -> None:
    classes = Classes(sde)
    labels = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    x0 = randn64(4, 2)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64) * sde.T
    loss = classifier_loss(classes.classifier, sde, x0, labels, t=t, generator=seeded(1))
    x = sde.perturb(x0, t, generator=seeded(1)).x
    for k in range(4):
        logs = classes.classifier(x[k : k + 1], t[k : k + 1])[0]
        wanted = torch.log(torch.exp(logs).sum()) - logs[labels[k]]
        torch.testing.assert_close(loss[k], wanted, rtol=1e-9, atol=1e-9)


class QuarterTimes(TimeSampler):
    def sample(self, sde, n, *, generator=None, device=None, dtype=None):
        return torch.full((n,), 0.25, dtype=dtype), torch.arange(n, dtype=dtype)


def test_loss_uses_times_and_weights() -> None:
    times = []

    def classifier(x, t):
        times.append(t)
        return torch.zeros(len(x), 8)

    x0, labels = torch.zeros(5, 3), torch.arange(5)
    loss = classifier_loss(classifier, VPSDE(), x0, labels, times=QuarterTimes())
    assert torch.equal(times[0], torch.full((5,), 0.25))
    torch.testing.assert_close(loss, math.log(8) * torch.arange(5.0))
    loss = classifier_loss(classifier, VPSDE(), torch.zeros(4000, 1), torch.zeros(4000).long())
    torch.testing.assert_close(loss, torch.full((4000,), math.log(8)))
    assert float(times[1].mean()) == pytest.approx(0.5, abs=0.03)
    assert times[1].min() >= VPSDE().t_min


def test_loss_does_not_depend_on_its_batch() -> None:
    classifier = NoiseClassifier(lambda x, noise_label: x * noise_label.unsqueeze(1), VPSDE())
    x0, labels = torch.randn(3, 4, generator=seeded()), torch.tensor([0, 3, 1])
    together = classifier_loss(
        classifier, VPSDE(), x0, labels, generator=[seeded(k) for k in range(3)]
    )
    for k in range(3):
        part = classifier_loss(
            classifier, VPSDE(), x0[k : k + 1], labels[k : k + 1], generator=[seeded(k)]
        )
        torch.testing.assert_close(part, together[k : k + 1])


def test_trained_classifier_is_close_to_the_true_one_and_guides() -> None:
    sde = VPSDE()
    model = GaussianMixtureModel(sde, [[-0.5, 0.0], [0.5, 0.3]], [0.3, 0.3])
    labels = torch.arange(2000) % 2
    x0 = (model.means[labels] + 0.3 * randn64(2000, 2)).float()
    torch.manual_seed(0)
    seen = []

    def watch(items):
        for item in items:
            seen.append(item)
            yield item

    classifier = NoiseClassifier(MLP(2, out_features=2, width=32, depth=1), sde)
    got = train_noise_classifier(
        classifier, sde, x0, labels, steps=400, lr=5e-3, generator=seeded(), progress=watch
    )
    assert got is classifier
    assert not any(module.training for module in got.modules())
    assert len(seen) == 400
    t = torch.linspace(0.01, 1, 2000)
    x = sde.perturb(x0, t, generator=seeded(3)).x
    parts = [GaussianMixtureModel(sde, model.means[k : k + 1], [0.3]) for k in (0, 1)]
    true = torch.stack([part.log_prob(x, t) for part in parts], 1).softmax(1)
    with torch.no_grad():
        error = (got(x, t).softmax(1) - true).abs().mean()
    assert error < 0.04

    labels = torch.arange(400) % 2
    sampler = PCSampler(ClassifierGuidance(model, got), DDIM(), steps=30, grid=LogSNRGrid())
    samples = sampler((400, 2), generator=seeded(4), class_labels=labels)
    for k in (0, 1):
        mean = samples[labels == k].mean(0).double()
        torch.testing.assert_close(mean, model.means[k], rtol=0, atol=0.1)


def test_training_is_reproducible_and_in_training_mode() -> None:
    modes = []

    class Net(torch.nn.Linear):
        def forward(self, x, label):
            modes.append(self.training)
            return super().forward(x)

    x0, labels = torch.randn(10, 2, generator=seeded()), torch.arange(10) % 3
    weights = []
    for k in range(2):
        torch.manual_seed(1)
        classifier = NoiseClassifier(Net(2, 3), VPSDE()).eval()
        torch.manual_seed(k)
        train_noise_classifier(
            classifier, VPSDE(), x0, labels, steps=3, batch_size=4, generator=seeded(2)
        )
        weights.append(classifier.network.weight)
    assert torch.equal(*weights)
    assert modes == [True] * 6


def test_learning_rate_decays() -> None:
    """With gradients of constant sign, the length of Adam's steps is the learning rate."""
    weights = []

    def watch(items):
        for item in items:
            weights.append(net.bias.detach().clone())
            yield item

    net = torch.nn.Linear(1, 2)
    classifier = NoiseClassifier(lambda x, noise_label: net(x), VPSDE())
    classifier.net = net
    train_noise_classifier(
        classifier, VPSDE(), torch.ones(8, 1), torch.zeros(8).long(), steps=10, lr=1e-3,
        generator=seeded(), progress=watch,
    )  # fmt: skip
    lengths = torch.stack([*weights, net.bias.detach()]).diff(dim=0).abs().amax(1)
    wanted = 1e-3 * torch.arange(10, 0, -1) / 10
    torch.testing.assert_close(lengths, wanted, rtol=0.2, atol=0)


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
def test_invalid_classifiers(make, error, match) -> None:
    with pytest.raises(error, match=match):
        make(VPSDE())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"classifier": lambda x, t: x}, TypeError, "classifier: expected a Module"),
        ({"sde": None}, TypeError, "sde: expected a ForwardSDE"),
        ({"data": torch.full((6, 2), math.nan)}, ValueError, "data: expected finite values"),
        ({"data": [1.0]}, TypeError, "data: expected a tensor"),
        ({"class_labels": torch.zeros(5).long()}, ValueError, r"labels: .* shape \(6,\), got \(5,"),
        ({"class_labels": torch.zeros(6)}, TypeError, "class_labels: expected integers"),
        ({"class_labels": torch.full((6,), 2)}, ValueError, r"class_labels: .* in \[0, 2\)"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1"),
        ({"sde": DDPMChain.cosine(100)}, ValueError, "classifier: expected the process of the"),
        ({"times": 3}, TypeError, "times: expected a TimeSampler, got int"),
        ({"generator": [seeded()]}, TypeError, "generator: expected a Generator, got list"),
        ({"lr": 0.0}, ValueError, "lr: expected a finite number > 0"),
        ({"lr": math.nan}, ValueError, "lr: expected a finite number > 0"),
    ],
)
def test_invalid_training_arguments(change, error, match) -> None:
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
    ("x0", "labels", "t", "error", "match"),
    [
        (torch.full((2, 2), math.inf), [0, 1], None, ValueError, "x0: expected finite values"),
        (torch.zeros(2, 2).long(), [0, 1], None, TypeError, "x0: expected a floating-point"),
        (torch.zeros(2, 2), [0, 2], None, ValueError, r"class_labels: .* in \[0, 2\)"),
        (torch.zeros(2, 2), [0], None, ValueError, "class_labels: expected one label"),
        (torch.zeros(2, 2), [0, 1], torch.ones(3), ValueError, "t: expected one time"),
        (torch.zeros(2, 2), [0, 1], 0.5, TypeError, r"t: .* of shape \(B,\), got float"),
    ],
)
def test_invalid_loss_arguments(x0, labels, t, error, match) -> None:
    sde = DDPMChain.linear(100)
    with pytest.raises(error, match=match):
        classifier_loss(lambda x, t: x, sde, x0, torch.tensor(labels), t=t)


def test_loss_rejects_two_sets_of_times_and_another_process() -> None:
    x0, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="times: expected times or t, got both"):
        classifier_loss(lambda x, t: x, VPSDE(), x0, labels, t=torch.ones(2), times=QuarterTimes())
    classifier = NoiseClassifier(lambda x, noise_label: x, VPSDE())
    with pytest.raises(ValueError, match=r"classifier: expected the process .* got VPSDE with"):
        classifier_loss(classifier, VPSDE(beta_max=10.0), x0, labels)


def test_repr() -> None:
    text = repr(NoiseClassifier(len, VPSDE(), 0.7, label=TimeLabel(999.0)))
    assert "sigma_data=0.7,\n    label=TimeLabel(scale=999.0)" in text
