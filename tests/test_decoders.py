import math

import pytest
import torch
from support import f64

import diffusionkit.decoders as module
from diffusionkit.decoders import GaussianDecoder, LevelDecoder, Levels
from diffusionkit.sde import LogSNRSDE

# Expected cost in nats of one of 256 levels at gamma = -13.3, computed with 40 digits.
INTERIOR, EDGE = 0.007245597810443312, 0.0036227989052217296

# x, mean, log of the standard deviation; log-likelihood, exact (40 digits) and of the tanh form.
ROWS = [
    (-1.0, -1.0, -6.0, -0.05849428929869401, -0.05862264931098335),
    (-1.0, -0.2, -6.0, -51578.87235614245, -27.631021115928547),
    (-1.0, -0.2, -2.0, -20.018481868566983, -23.909789942628787),
    (-1.0, 0.9, -6.0, -292568.52595831756, -27.631021115928547),
    (-1.0, 1.0, -6.0, -324241.9362731584, -27.631021115928547),
    (-1.0, 1.0, -2.0, -112.3831673608805, -27.631021115928547),
    (-0.9921568627450981, -0.2, -6.0, -50567.667749640175, -27.631021115928547),
    (-0.9921568627450981, 0.0, -2.0, -30.63221931855212, -27.631021115928547),
    (-0.9921568627450981, 0.9, -6.0, -290153.16812283156, -27.631021115928547),
    (-0.9921568627450981, 1.0, -6.0, -321698.92782894184, -27.631021115928547),
    (-0.0039215686274509665, -1.0, -2.0, -30.84501085039101, -27.631021115928547),
    (-0.0039215686274509665, -0.2, -6.0, -3010.0697707833356, -27.631021115928547),
    (-0.0039215686274509665, 0.0, -6.0, -0.6947037714259012, -0.6944852283279843),
    (-0.0039215686274509665, 0.9, -2.0, -26.066330353973733, -27.631021115928547),
    (0.0039215686274509665, -1.0, -6.0, -81384.31465417928, -27.631021115928547),
    (0.0039215686274509665, -0.2, -2.0, -4.902082066169761, -4.9000282951460585),
    (0.0039215686274509665, 0.0, -2.0, -3.7676145382129187, -3.7676173039081804),
    (0.0039215686274509665, 0.9, -6.0, -64778.6439208336, -27.631021115928547),
    (0.0039215686274509665, 1.0, -2.0, -30.84501085039101, -27.631021115928547),
    (0.9921568627450981, -0.2, -6.0, -114904.08983880676, -27.631021115928547),
    (0.9921568627450981, 0.0, -2.0, -30.63221931855212, -27.631021115928547),
    (0.9921568627450981, 1.0, -6.0, -2.8679489700745155, -2.8658066726625995),
    (1.0, -1.0, -6.0, -324241.9362731584, -27.631021115928547),
    (1.0, -1.0, -2.0, -112.3831673608805, -27.631021115928547),
    (1.0, 0.0, -6.0, -80747.30811954959, -27.631021115928547),
    (1.0, 0.9, -6.0, -755.777039894813, -27.631021115928547),
    (1.0, 0.9, -2.0, -1.4318186108278363, -1.43147729937292),
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_centers_match_the_paper(dtype) -> None:
    k = torch.tensor([[0, 1, 128, 255]]).to(dtype)
    expected = torch.tensor([[2 * (i + 0.5) / 256 - 1 for i in (0, 1, 128, 255)]])
    torch.testing.assert_close(Levels().encode(k), expected, rtol=0, atol=0)
    assert Levels().encode(k, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("parts", [(2, -1.0, 1.0), (17, 0.0, 1.0), (256, -1, 1), (1000, -3.0, 0.1)])
def test_decode_inverts_encode(parts) -> None:
    levels = Levels(*parts)
    k = torch.arange(levels.levels).view(1, -1)
    x = levels.encode(k)
    assert torch.equal(levels.decode(x), k)
    for shift in (-0.49, 0.49):
        assert torch.equal(levels.decode(x + shift * levels.width), k)
    assert levels.width == pytest.approx((parts[2] - parts[1]) / parts[0])


def test_values_out_of_range_decode_to_the_outermost_levels() -> None:
    assert Levels(4).decode(torch.tensor([-9.0, 1.0, 9.0])).tolist() == [0, 3, 3]


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        ([[1]], TypeError, "expected a tensor of integers .* got list"),
        (torch.zeros(1, 2), TypeError, "integers 0 ... 3, got torch.float32"),
        (torch.zeros(1, 2, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(1, 2, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.tensor([[0, 4]]), ValueError, "levels 0 ... 3, got 0 to 4"),
        (torch.tensor([[-1, 2]]), ValueError, "levels 0 ... 3, got -1 to 2"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "non-empty"),
        (torch.tensor(1), ValueError, "non-empty"),
    ],
)
def test_invalid_images_raise(images, error, match) -> None:
    with pytest.raises(error, match=match):
        Levels(4).encode(images)


def test_invalid_levels_raise() -> None:
    with pytest.raises(ValueError, match="levels: expected an integer >= 2, got 1"):
        Levels(1)
    with pytest.raises(TypeError, match="levels: expected an integer"):
        Levels(2.0)
    with pytest.raises(TypeError, match="low: expected a number, got str"):
        Levels(4, "0")
    with pytest.raises(TypeError, match="high: expected a number, got NoneType"):
        Levels(4, 0.0, None)
    for low, high in ((1.0, 1.0), (1.0, -1.0), (-math.inf, 0.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="finite low < high"):
            Levels(4, low, high)


def test_every_integer_dtype_is_checked() -> None:
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64):
        Levels(4).check(torch.tensor([[0, 3]], dtype=dtype))
        with pytest.raises(ValueError, match="got 0 to 4"):
            Levels(4).check(torch.tensor([[0, 4]], dtype=dtype))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_exact_cdf_matches_40_digit_values(dtype, rtol) -> None:
    x, mean, log_scale, exact, _ = torch.tensor(ROWS, dtype=torch.float64).to(dtype).T
    got = GaussianDecoder().log_prob(x, mean, 2 * log_scale)
    torch.testing.assert_close(got, exact, rtol=rtol, atol=rtol)


def test_tanh_cdf_matches_independent_values() -> None:
    x, mean, log_scale, _, tanh = torch.tensor(ROWS, dtype=torch.float64).T
    got = GaussianDecoder(cdf="tanh").log_prob(x, mean, 2 * log_scale)
    torch.testing.assert_close(got, tanh, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("parts", [(256, -1.0, 1.0), (2, -1.0, 1.0), (17, 0.0, 3.0)])
@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 0.5])
def test_gaussian_decoder_probabilities_sum_to_one(cdf, parts, log_scale) -> None:
    decoder = GaussianDecoder(*parts, cdf=cdf)
    x = decoder.encode(torch.arange(parts[0]), dtype=torch.float64)
    assert x[0] == parts[1]
    assert x[-1] == pytest.approx(parts[2], abs=1e-14)
    for mean in (0.1, -0.95, 1.2):
        total = decoder.log_prob(x, f64(mean), f64(2 * log_scale)).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-9)


def test_gaussian_decoder_levels_of_8_bit_images() -> None:
    images = torch.tensor([[0, 1, 100, 255]], dtype=torch.uint8)
    expected = f64(0.0, 1.0, 100.0, 255.0) / 127.5 - 1
    got = GaussianDecoder().encode(images, dtype=torch.float64)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("log_scale", [-10.0, -6.0, -3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("mean", [-40.0, -1.3, -0.2, 0.0039, 0.0, 0.5, 1.0, 30.0])
def test_gaussian_decoder_in_single_precision(mean, log_scale) -> None:
    """Narrow bins, wide bins and both tails."""
    x = GaussianDecoder().encode(torch.tensor([1, 127, 200, 254]), dtype=torch.float64).float()
    many = [c.double() for c in (x, torch.tensor(mean), torch.tensor(2 * log_scale))]
    want, got = (GaussianDecoder().log_prob(*parts) for parts in (many, [c.float() for c in many]))
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("log_scale", [-14.0, -6.0, -2.0, 1.0, 30.0])
def test_gradients_are_finite_and_point_to_the_data(log_scale) -> None:
    """In float32, in both tails, in the open bins and in bins of negligible probability."""
    x = GaussianDecoder().encode(torch.tensor([0, 1, 127, 254, 255]))
    mean = torch.tensor([0.5, 1.0, -0.7, -1.0, 0.1], requires_grad=True)
    log_var = torch.full((5,), 2 * log_scale, requires_grad=True)
    ll = GaussianDecoder().log_prob(x, mean, log_var)
    assert bool(torch.isfinite(ll).all())
    of_mean, of_log_var = torch.autograd.grad(ll.sum(), [mean, log_var])
    assert bool(torch.isfinite(of_log_var).all())
    assert torch.equal(torch.sign(of_mean), torch.sign(x - mean))
    if log_scale == 30.0:  # density 1/s in a narrow bin: d(-log s)/d(log s^2) = -1/2
        torch.testing.assert_close(of_log_var[1:4], torch.full((3,), -0.5))
    if log_scale == -6.0:  # dominated by the nearer edge
        edge = (x[1] + 1 / 255 - mean[1].detach()) * math.exp(-2 * log_scale)
        assert float(of_mean[1]) == pytest.approx(float(edge), rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ({"levels": 1}, ValueError, "levels: expected an integer >= 2, got 1"),
        ({"low": 1.0}, ValueError, "expected finite low < high, got 1.0 and 1.0"),
        ({"cdf": "erf"}, ValueError, "cdf: expected one of 'exact', 'tanh', got 'erf'"),
    ],
)
def test_invalid_gaussian_decoders_raise(parts, error, match) -> None:
    with pytest.raises(error, match=match):
        GaussianDecoder(**parts)


def test_data_between_levels_raise() -> None:
    decoder = GaussianDecoder()
    decoder.check(decoder.encode(torch.arange(256)))
    for bad in (0.0, 1.01, -1.004):
        with pytest.raises(ValueError, match="expected data on 256 levels from -1 to 1"):
            decoder.check(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize(("level", "expected"), [(100, INTERIOR), (0, EDGE), (255, EDGE)])
def test_level_decoder_expected_cost(level, expected) -> None:
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
def test_level_decoder_probabilities_sum_to_one(parts, sigma) -> None:
    decoder = LevelDecoder(*parts)
    k = torch.arange(decoder.levels, dtype=torch.int16).unsqueeze(1)
    ones = torch.ones(len(k), dtype=torch.float64)
    z = 0.3 * ones.unsqueeze(1)
    total = decoder.log_prob(k, z, 0.7 * ones, sigma * ones).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_level_decoder_by_hand() -> None:
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


def test_blocks_change_neither_values_nor_gradients(monkeypatch) -> None:
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
    """Pixels times levels are neither in memory at once nor saved for the backward pass."""
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


def test_level_decoder_in_single_precision() -> None:
    torch.manual_seed(0)
    sde, decoder = LogSNRSDE(), LevelDecoder()
    images = torch.randint(256, (4, 3072))
    x, eps = decoder.encode(images, dtype=torch.float64), torch.randn(4, 3072).double()
    alpha, sigma = sde.marginal(torch.zeros(4).double())
    z = alpha.unsqueeze(1) * x + sigma.unsqueeze(1) * eps
    expected = decoder.log_prob(images, z, alpha, sigma)
    got = decoder.log_prob(images, z.float(), alpha.float(), sigma.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=0)


def test_invalid_level_decoder_arguments_raise() -> None:
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
    with pytest.raises(ValueError, match="sigma: expected values > 0, got 0"):
        decoder.log_prob(k, torch.zeros(2, 3), one, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"levels 0 \.\.\. 3, got 0 to 4"):
        decoder.log_prob(torch.tensor([[0, 4]]), torch.zeros(1, 2), one[:1], one[:1])
