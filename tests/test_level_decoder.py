import math

import pytest
import torch

import diffusionkit.decoders as module
from diffusionkit.decoders import LevelDecoder
from diffusionkit.sde.learned import LogSNRSDE

# Expected -log P of one of 256 levels at gamma = -13.3, to 40 digits by other code.
INTERIOR, EDGE = 0.007245597810443312, 0.0036227989052217296


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("level", "expected"), [(100, INTERIOR), (0, EDGE), (255, EDGE)])
def test_expected_log_probability(level, expected) -> None:
    alpha, sigma = (c.item() for c in LogSNRSDE().marginal(f64(0.0)))
    h = 0.005
    eps = torch.arange(-12, 12, h, dtype=torch.float64)
    density = torch.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi)
    images = torch.full((len(eps), 1), level)
    decoder = LevelDecoder()
    z = alpha * decoder.encode(images, dtype=torch.float64) + sigma * eps.unsqueeze(1)
    log_prob = decoder.log_prob(images, z, *(torch.full_like(eps, c) for c in (alpha, sigma)))
    # The trapezoidal rule: the integrand vanishes at both ends.
    assert -float((log_prob * density).sum() * h) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("parts", [(4, -1.0, 1.0), (256, 0.0, 1.0)])
def test_probabilities_sum_to_one(parts, sigma) -> None:
    decoder = LevelDecoder(*parts)
    k = torch.arange(decoder.levels, dtype=torch.int16).unsqueeze(1)
    ones = torch.ones(len(k), dtype=torch.float64)
    z = 0.3 * ones.unsqueeze(1)
    total = decoder.log_prob(k, z, 0.7 * ones, sigma * ones).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_explicit_softmax() -> None:
    images, z = torch.tensor([[1, 0], [1, 1]]), f64(*[[0.2, -0.4], [0.5, 0.1]])
    alpha, sigma = (0.9, 0.5), (0.3, 0.8)
    expected = []
    for b in range(2):
        total = 0.0
        for i in range(2):  # two levels, at -1/2 and 1/2
            snr, data = (alpha[b] / sigma[b]) ** 2, float(z[b, i]) / alpha[b]
            logits = [-0.5 * snr * (data - x) ** 2 for x in (-0.5, 0.5)]
            total += logits[images[b, i]] - math.log(sum(map(math.exp, logits)))
        expected.append(total)
    got = LevelDecoder(2).log_prob(images, z, f64(*alpha), f64(*sigma))
    torch.testing.assert_close(got, f64(*expected))


def test_values_and_gradients_do_not_depend_on_the_block_size(monkeypatch) -> None:
    torch.manual_seed(0)
    images = torch.randint(16, (3, 2, 5), dtype=torch.uint8)
    parts = [torch.randn(3, 2, 5).double(), f64(0.9, 0.5, 0.7), f64(0.1, 0.4, 2.0)]
    results = []
    for block in (2**22, 48, 1):
        monkeypatch.setattr(module, "_BLOCK", block)
        inputs = [part.clone().requires_grad_() for part in parts]
        log_prob = LevelDecoder(16).log_prob(images, *inputs)
        results.append((log_prob.detach(), *torch.autograd.grad(log_prob.sum(), inputs)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
    assert torch.autograd.gradcheck(
        lambda *inputs: LevelDecoder(16).log_prob(images, *inputs), tuple(inputs)
    )


def test_memory_does_not_grow_with_the_number_of_levels(monkeypatch) -> None:
    """Arrays of pixels times levels are neither allocated nor saved for the backward pass."""
    held, kept, whole = [], [], LevelDecoder._block

    def block(self, data, *rest):
        held.append(data.numel() * self.levels)
        return whole(self, data, *rest)

    def keep(x):
        kept.append(x.numel())
        return x

    monkeypatch.setattr(module, "_BLOCK", 4096)
    monkeypatch.setattr(LevelDecoder, "_block", block)
    z, images = torch.zeros(2, 500, requires_grad=True), torch.zeros(2, 500, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        LevelDecoder(1024).log_prob(images, z, torch.ones(2), torch.ones(2))
    assert max(held) <= 4096
    assert sum(kept) < 20 * z.numel()


def test_single_precision() -> None:
    torch.manual_seed(0)
    sde, decoder = LogSNRSDE(), LevelDecoder()
    images = torch.randint(256, (4, 3072))
    x, eps = decoder.encode(images, dtype=torch.float64), torch.randn(4, 3072).double()
    alpha, sigma = sde.marginal(torch.zeros(4).double())
    z = alpha.unsqueeze(1) * x + sigma.unsqueeze(1) * eps
    expected = decoder.log_prob(images, z, alpha, sigma)
    got = decoder.log_prob(images, z.float(), alpha.float(), sigma.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=0)


def test_bad_input() -> None:
    decoder, k, one = LevelDecoder(4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    with pytest.raises(TypeError, match="images: expected integers"):
        decoder.log_prob(k.float(), k.float(), one, one)
    with pytest.raises(TypeError, match="z: expected a floating-point tensor"):
        decoder.log_prob(k, k, one, one)
    with pytest.raises(ValueError, match=r"shape of images, \(2, 3\), got \(2, 4\)"):
        decoder.log_prob(k, torch.zeros(2, 4), one, one)
    with pytest.raises(ValueError, match=r"alpha: expected shape \(2,\), got \(1,\)"):
        decoder.log_prob(k, torch.zeros(2, 3), one[:1], one)
    with pytest.raises(ValueError, match=r"sigma: expected shape \(2,\), got \(2, 1\)"):
        decoder.log_prob(k, torch.zeros(2, 3), one, one[:, None])
    with pytest.raises(ValueError, match="sigma: expected noise > 0, got 0"):
        decoder.log_prob(k, torch.zeros(2, 3), one, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"levels 0 \.\.\. 3, got 0 to 4"):
        decoder.log_prob(torch.tensor([[0, 4]]), torch.zeros(1, 2), one[:1], one[:1])
