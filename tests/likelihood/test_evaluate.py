"""Bits per dimension of a data set."""

import math
from types import SimpleNamespace

import pytest
import torch
from support import seeded
from support.processes import run_in_two_processes

from diffusionkit import (
    NELBO,
    VPSDE,
    CheckpointError,
    EpsModel,
    GaussianMixtureModel,
    ODELikelihood,
    UniformDequantizer,
    evaluate_bits_per_dim,
)

D = 3


def images(n: int = 10) -> torch.Tensor:
    return torch.randint(0, 8, (n, D), generator=seeded())


def bound(samples: int = 2) -> NELBO:
    return NELBO(GaussianMixtureModel(VPSDE(), torch.zeros(1, D), [0.5]), samples=samples)


def evaluate(likelihood, data, **options):
    return evaluate_bits_per_dim(
        likelihood,
        data,
        **{"dequantizer": UniformDequantizer(levels=8), "progress": False} | options,
    )


class Counting:
    """The negative log-density of a standard normal, which records its batch sizes."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.sizes: list[int] = []
        self.stop_at = stop_at

    def __call__(self, x, *, generator=None, **cond):
        if len(self.sizes) == self.stop_at:
            raise KeyboardInterrupt
        self.sizes.append(len(x))
        nats = 0.5 * x.double().square().sum(1) + 0.5 * D * math.log(2 * math.pi)
        return SimpleNamespace(nats=nats + cond.get("shift", torch.zeros(len(x))))


def test_a_uniform_density_has_log2_levels_bits() -> None:
    def uniform(x, *, generator=None):
        return SimpleNamespace(nats=torch.full((len(x),), D * math.log(2.0), dtype=torch.float64))

    result = evaluate(uniform, images())
    assert result.mean == pytest.approx(3.0)
    assert result.stderr == pytest.approx(0.0, abs=1e-9)
    assert str(result) == "3.0000 +- 0.0000 bits/dim"


def test_the_last_batch_is_included() -> None:
    likelihood = Counting()
    result = evaluate(likelihood, images(10), batch_size=4, draws=2)
    assert likelihood.sizes == [4, 4, 2] * 2
    assert result.bits.shape == (10, 2)
    assert bool(result.bits.isfinite().all())
    assert result.mean == pytest.approx(float(result.bits.mean()))
    items = result.bits.mean(1)
    assert result.stderr == pytest.approx(float(items.std()) / math.sqrt(10))
    spread = (result.bits[:, 0] - result.bits[:, 1]).square() / 2
    assert result.draw_stderr == pytest.approx(math.sqrt(float(spread.mean()) / 20))
    assert evaluate(likelihood, images()).draw_stderr is None


def test_continuous_data() -> None:
    x = torch.randn(6, D, generator=seeded(1))
    result = evaluate_bits_per_dim(Counting(), x, progress=False)
    expected = (0.5 * x.double().square().sum(1) / D + 0.5 * math.log(2 * math.pi)) / math.log(2)
    torch.testing.assert_close(result.bits[:, 0], expected)


def test_random_numbers_depend_on_the_item_and_draw() -> None:
    one, other = (evaluate(bound(), images(), batch_size=size, draws=2) for size in (3, 10))
    torch.testing.assert_close(one.bits, other.bits, rtol=1e-9, atol=0)
    assert not torch.equal(one.bits[:, 0], one.bits[:, 1])
    assert not torch.equal(one.bits, evaluate(bound(), images(), draws=2, seed=1).bits)


def test_results_are_close_to_exact_probabilities() -> None:
    # N(0, .5^2) on the bins of [-1, 1]: exact probabilities by the error function.
    edges = torch.linspace(-1, 1, 9, dtype=torch.float64)
    cdf = 0.5 * (1 + torch.erf(edges / 0.5 / math.sqrt(2)))
    data = images(100)
    truth = -torch.log2(cdf.diff())[data].mean(1)
    model = bound().model
    for likelihood, slack in ((ODELikelihood(model), 1e-3), (bound(64), 0.2)):
        result = evaluate(likelihood, data, draws=20 if slack < 0.1 else 4)
        gap = result.mean - float(truth.mean())
        # Uniform dequantization has a small gap, as the density in a bin is not constant.
        assert -3 * result.draw_stderr < gap < 0.02 + 3 * result.draw_stderr


def test_data_sets_and_conditions() -> None:
    data = list(images(5))
    shift = torch.arange(5, dtype=torch.float64)
    plain = evaluate(Counting(), data, batch_size=2)
    shifted = evaluate(Counting(), data, batch_size=2, cond={"shift": shift})
    difference = (shifted.bits - plain.bits)[:, 0] * D * math.log(2)
    torch.testing.assert_close(difference, shift)


def test_modes_and_gradients() -> None:
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(D, D))
    seen = []

    def call(x, label):
        seen.append((network.training, torch.is_grad_enabled()))
        return network(x)

    model = EpsModel(call, VPSDE())
    model.add_module("inner", network)
    evaluate(NELBO(model.train()), images(4))
    assert seen
    assert set(seen) == {(False, False)}
    assert network.training


def test_an_interrupted_run_resumes(tmp_path) -> None:
    path = tmp_path / "bits.pt"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Counting(stop_at=3), images(), batch_size=3, path=path)
    rest = Counting()
    result = evaluate(rest, images(), batch_size=3, path=path)
    assert rest.sizes == [1]
    assert torch.equal(result.bits, evaluate(Counting(), images(), batch_size=3).bits)
    none = Counting()
    assert torch.equal(evaluate(none, images(), batch_size=3, path=path).bits, result.bits)
    assert none.sizes == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits.pt"]


def test_a_file_with_other_settings_is_rejected(tmp_path) -> None:
    path = tmp_path / "bits.pt"
    evaluate(Counting(), images(), path=path)
    with pytest.raises(ValueError, match=r"expected results with .*'seed': 1"):
        evaluate(Counting(), images(), path=path, seed=1)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(CheckpointError):
        evaluate(Counting(), images(), path=path)


PROGRAM = """
from diffusionkit import *

data = torch.randint(0, 8, (10, 3), generator=torch.Generator().manual_seed(0))
model = GaussianMixtureModel(VPSDE(), torch.zeros(1, 3), [0.5])
calls = 0
def likelihood(x, **options):
    global calls
    calls += 1
    return ODELikelihood(model)(x, **options)
bits = evaluate_bits_per_dim(likelihood, data, dequantizer=UniformDequantizer(levels=8),
                             batch_size=3, draws=2, path=f"{folder}/bits.pt", progress=False).bits
result = calls, bits
"""


def test_processes_share_the_work_and_agree_bit_for_bit(tmp_path) -> None:
    (calls, bits), (other_calls, other) = run_in_two_processes(PROGRAM, tmp_path)
    assert (calls, other_calls) == (4, 4)
    assert torch.equal(bits, other)
    alone = evaluate(ODELikelihood(bound().model), images(), batch_size=3, draws=2)
    assert torch.equal(bits, alone.bits)
    # A single process can resume from the results of both.
    none = Counting()
    assert torch.equal(
        evaluate(none, images(), batch_size=3, draws=2, path=tmp_path / "bits.pt").bits, bits
    )
    assert none.sizes == []


def test_custom_progress() -> None:
    seen = []
    evaluate(Counting(), images(), batch_size=4, progress=lambda items: seen.extend(items) or items)
    assert len(seen) == 3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        evaluate(Counting(), images(0))
    with pytest.raises(TypeError, match="with a length"):
        evaluate(Counting(), iter([1, 2]))
    with pytest.raises(TypeError, match="likelihood: expected a callable"):
        evaluate("NELBO", images())
    with pytest.raises(TypeError, match="dequantizer: expected a Dequantizer"):
        evaluate(Counting(), images(), dequantizer=lambda x: x)
    with pytest.raises(ValueError, match="class_labels: expected 10 entries, one per item, got 3"):
        evaluate(Counting(), images(), cond={"class_labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="draws"):
        evaluate(Counting(), images(), draws=0)
    with pytest.raises(TypeError, match="integer"):
        evaluate(Counting(), images().float())
    model = EpsModel(lambda x, noise_label: x, VPSDE(), data_range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"range of the model's data, \(0.0, 1.0\), got \(-1"):
        evaluate(NELBO(model), images())
    nan = lambda x, **_: SimpleNamespace(nats=torch.full((len(x),), torch.nan))  # noqa: E731
    with pytest.raises(ValueError, match="NaN for items 0 to 4"):
        evaluate(nan, images(), batch_size=4)
