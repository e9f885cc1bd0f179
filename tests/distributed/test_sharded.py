"""Sharded models: gathered in the process that writes, and loaded at any number of ranks."""

from typing import Any

import pytest
import torch
from support.nested import same
from support.processes import run_in_processes, skip_without_sharding_on_cpu

from diffusionkit import (
    EMA,
    VPSDE,
    EpsModel,
    PowerEMA,
    load_checkpoint,
    reconstruct_ema,
    save_checkpoint,
)
from diffusionkit.checkpoints import load_model, load_network
from diffusionkit.distributed._sharded import has_sharded, placed, whole, write_whole
from diffusionkit.networks import MLP

BUILD = """
import os
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffusionkit import *
from diffusionkit.checkpoints import save_model, save_network
from diffusionkit.distributed import check_same_weights, seed_ranks
from diffusionkit.distributed._sharded import whole
from diffusionkit.networks import MLP

mesh = init_device_mesh("cpu", (world,))
torch.manual_seed(world)
net = MLP(3, width=10)  # does not divide evenly
model = EpsModel(net, VPSDE())
fully_shard(net, mesh=mesh)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
ema, power = EMA(model, decay=0.5, warmup=False), PowerEMA(model)
parts = {"ema": ema, "optimizer": optimizer, "stateful": {"power": power}}
seed_ranks(world)

def states():
    named = {n: whole(optimizer.state[p]) for n, p in model.named_parameters()}
    return whole([dict(net.state_dict()), ema.state_dict(), power.state_dict(), named])
"""

SAVE = (
    BUILD
    + """
for step in range(3):
    ScoreMatching()(model, torch.randn(4, 3)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)
    power.update(model)
    if step:
        power.save(f"{folder}/snapshots")
save_checkpoint(f"{folder}/run.pt", model, step=3, **parts)
drawn = torch.rand(3)
save_checkpoint(f"{folder}/own-{rank}.pt", model)
save_network(f"{folder}/network.pt", net)
save_model(f"{folder}/whole", model)
found = sorted(os.listdir(folder))  # of every rank, when its calls have returned
try:
    save_checkpoint(f"{folder}/missing/run.pt", model)
except OSError as error:
    failed = type(error).__name__, error.filename
check_same_weights(model)
result = states(), found, failed, drawn
"""
)

LOAD = (
    BUILD
    + """
resumed = load_checkpoint(f"{folder}/../run/run.pt", model, **parts)
result = states(), resumed.step, torch.rand(3)
"""
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Any, Any]:
    skip_without_sharding_on_cpu()
    folder = tmp_path_factory.mktemp("sharded") / "run"
    folder.mkdir()
    return folder, run_in_processes(2, SAVE, folder)


def states(model: Any, ema: EMA, power: PowerEMA, optimizer: torch.optim.Optimizer) -> Any:
    named = {n: optimizer.state[p] for n, p in model.named_parameters()}
    return [dict(model.network.state_dict()), ema.state_dict(), power.state_dict(), named]


def loaded(path: Any) -> tuple[Any, Any]:
    model = EpsModel(MLP(3, width=10), VPSDE())
    ema, power = EMA(model), PowerEMA(model)
    optimizer = torch.optim.Adam(model.parameters())
    parts = {"ema": ema, "optimizer": optimizer, "stateful": {"power": power}}
    resumed = load_checkpoint(path, model, **parts, restore_random=False)
    return resumed, states(model, ema, power, optimizer)


@pytest.mark.slow
def test_a_sharded_run_is_loaded_in_one_process(saved) -> None:
    folder, ranks = saved
    resumed, found = loaded(folder / "run.pt")
    assert resumed.step == 3
    for right, *_ in ranks:
        assert same(found, right)
    assert not has_sharded(found)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_sharded_run_is_loaded_at_other_numbers_of_ranks(saved, tmp_path_factory, count) -> None:
    folder, ranks = saved
    other = folder.parent / f"load-{count}"
    other.mkdir()
    results = run_in_processes(count, LOAD, other)
    assert all(same(found, ranks[0][0]) for found, *_ in results)
    assert all(step == 3 for _, step, _ in results)
    draws = [tuple(x.tolist()) for *_, x in results]
    assert len(set(draws)) == count
    own = [tuple(x.tolist()) for *_, x in ranks]
    assert (draws == own) == (count == 2)


@pytest.mark.slow
def test_files_are_complete_when_any_rank_returns(saved) -> None:
    folder, ranks = saved
    for _, found, failed, _ in ranks:
        files = {"run.pt", "own-0.pt", "own-1.pt", "network.pt", "snapshots", "whole"}
        assert files <= set(found)
        assert failed == ("FileNotFoundError", f"{folder}/missing/run.pt")
    for rank in (0, 1):  # a file of each rank, with the weights of all
        model = EpsModel(MLP(3, width=10), VPSDE())
        load_checkpoint(folder / f"own-{rank}.pt", model, restore_random=False)
        assert same(dict(model.network.state_dict()), ranks[0][0][0])
    network = load_network(folder / "network.pt")
    assert same(dict(network.state_dict()), ranks[0][0][0])
    for model in (load_model(folder / "whole"), load_model(folder / "run.pt", ema=False)):
        assert type(model) is EpsModel
        assert same(dict(model.network.state_dict()), ranks[0][0][0])


@pytest.mark.slow
def test_snapshots_of_a_sharded_run_are_reconstructed(saved) -> None:
    folder, ranks = saved
    average = ranks[0][0][2]
    assert len(list((folder / "snapshots").iterdir())) == 4
    found = reconstruct_ema(folder / "snapshots", 0.05)
    prefix = "0_05.model."
    expected = {n.removeprefix(prefix): x for n, x in average.items() if n.startswith(prefix)}
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_whole_states_are_returned_unchanged() -> None:
    state = {"a": [torch.ones(2), (1, None)]}
    assert whole(state) is state
    assert placed(state["a"][0], torch.zeros(2)) is state["a"][0]
    assert not has_sharded(state)


def test_whole_states_are_written_without_asking_other_processes(tmp_path) -> None:
    seen = []
    state = {"a": torch.ones(2)}
    write_whole(tmp_path / "x", state, seen.append)
    assert seen[0] is state
    model = EpsModel(MLP(3), VPSDE())
    save_checkpoint(tmp_path / "run.pt", model)
    assert load_checkpoint(tmp_path / "run.pt", model).step == 0
