"""Threads that share a model or the process: none changes what another sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, current_thread, main_thread

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diffusionkit import (
    VPSDE,
    EpsModel,
    EulerMaruyama,
    ODELikelihood,
    PCSampler,
    ProbabilityFlow,
    ScoreModel,
    ddim_encode,
    evaluate_bits_per_dim,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit._loops import bare_networks, evaluation_mode
from diffusionkit.metrics import extract_features


def test_loading_in_threads_keeps_the_warning_filters(tmp_path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, torch.nn.Linear(2, 2))
    before, shown = list(warnings.filters), warnings.showwarning

    def load(_: int) -> None:
        for _ in range(5):
            load_checkpoint(path, torch.nn.Linear(2, 2), restore_random=False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(8)))
    assert warnings.filters == before
    assert warnings.showwarning is shown


class Meeting(nn.Module):
    """A network in which a second thread arrives during the first one's run, and stays longer."""

    def __init__(self, second: Callable[[], object]) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.second, self.future = second, None
        self.arrived, self.first_left = Event(), Event()
        self.pool, self.modes = ThreadPoolExecutor(1), []

    def forward(self, x: Tensor, noise_label: Tensor | None = None) -> Tensor:
        self.modes.append(self.dropout.training)
        if current_thread() is not main_thread():
            self.arrived.set()
            assert self.first_left.wait(60)
        elif self.future is None:
            self.future = self.pool.submit(self.second)
            assert self.arrived.wait(60)
        return 0.1 * x

    def leave(self) -> None:
        self.first_left.set()
        self.future.result(60)


X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
RUNS: dict[str, Callable[[ScoreModel], object]] = {
    "sampler": lambda model: PCSampler(model, EulerMaruyama(), steps=3)(X),
    "edit": lambda model: PCSampler(model, EulerMaruyama(), steps=3).edit(X, 0.8),
    "iterate": lambda model: list(PCSampler(model, EulerMaruyama(), steps=3).iterate(X)),
    "flow": lambda model: ProbabilityFlow(model, "euler", options={"step_size": 0.5}).sample(X),
    "encode": lambda model: ProbabilityFlow(model, "euler", options={"step_size": 0.5}).encode(X),
    "likelihood": lambda model: ODELikelihood(model, method="euler", options={"step_size": 0.5})(X),
    "ddim_encode": lambda model: ddim_encode(model, X, steps=3),
    "bits": lambda model: evaluate_bits_per_dim(
        ODELikelihood(model, method="euler", options={"step_size": 0.5}), X, progress=False
    ),
    "features": lambda model: extract_features(X, model.network, batch_size=2, progress=False),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_ends_leaves_the_others_in_evaluation_mode(name) -> None:
    """The second run is of another score model with the same network."""
    network = Meeting(lambda: RUNS[name](EpsModel(network, VPSDE())))
    model = EpsModel(network, VPSDE())
    RUNS[name](model)
    network.leave()
    assert not any(network.modes)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_modes_return_when_the_last_block_ends(order) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model[1][0].eval()
    blocks = [evaluation_mode(model), evaluation_mode(model[1]), evaluation_mode(model)]
    for block in blocks:
        block.__enter__()
        assert not any(m.training for m in model.modules())
    for i in order:
        assert not model[1].training
        blocks[i].__exit__(None, None, None)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]


def test_a_failing_run_counts_as_ended() -> None:
    model = nn.Dropout()
    with evaluation_mode(model):
        with pytest.raises(RuntimeError, match="stop"), evaluation_mode(model):
            raise RuntimeError("stop")
        assert not model.training
    assert model.training


class Failing(nn.Module):
    def train(self, mode: bool = True) -> nn.Module:
        if not mode:
            raise RuntimeError("no")
        return super().train(mode)


def test_a_model_without_an_evaluation_mode_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), Failing())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"), evaluation_mode(model):
            pass
        assert all(module.training for module in model.modules())


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_wrappers_return_when_the_last_block_ends(process_group, order) -> None:
    network = nn.Linear(2, 2)
    wrapped = DistributedDataParallel(network)
    model = EpsModel(wrapped, VPSDE())
    several = nn.ModuleDict({"model": model, "a": wrapped, "b": wrapped})
    blocks = [bare_networks(model), bare_networks(several)]
    for block in blocks:
        block.__enter__()
    assert several["a"] is several["b"] is network
    for i in order:
        assert model.network is network
        blocks[i].__exit__(None, None, None)
    assert model.network is several["a"] is several["b"] is wrapped
