"""Processes of torch.distributed: defaults without a group, and gathering with one."""

import pytest
import torch
from support.processes import run_in_two_processes, skip_without_sharding_on_cpu

from diffusionkit.distributed._group import (
    barrier,
    gather_objects,
    gather_rows,
    is_distributed,
    rank_and_world_size,
)

PROGRAM = """
from diffusionkit.distributed._group import *
from diffusionkit.distributed._sharded import *

rows = gather_rows(torch.full((1 + 2 * rank, 2), rank))
empty = gather_rows(torch.full((rank, 3), 0.5))
ranks = rank_and_world_size(), rank_and_world_size(world_size=5)
result = rows, empty, gather_objects({"rank": rank}), *ranks
"""


def test_processes_gather_unequal_rows_in_rank_order(tmp_path) -> None:
    for rank, found in enumerate(run_in_two_processes(PROGRAM, tmp_path)):
        rows, empty, objects, *defaults = found
        assert rows.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert empty.tolist() == [[0.5] * 3]
        assert objects == [{"rank": 0}, {"rank": 1}]
        assert defaults == [(rank, 2), (rank, 5)]


def test_without_a_process_group() -> None:
    x = torch.ones(2, 3)
    assert not is_distributed()
    assert gather_rows(x) is x
    assert gather_objects(x)[0] is x
    assert rank_and_world_size() == (0, 1)
    assert rank_and_world_size(2, 3) == (2, 3)
    barrier()


SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from diffusionkit import EMA, EpsModel, VPSDE, load_checkpoint, save_checkpoint
from diffusionkit.distributed._group import *
from diffusionkit.distributed._sharded import *
from diffusionkit.networks import MLP

mesh = init_device_mesh("cpu", (2,))
x = torch.arange(6.0).view(3, 2)
layouts = [x, *(distribute_tensor(x, mesh, [p]) for p in (Shard(0), Shard(1), Replicate()))]
moved = [placed(a, b) for a in layouts for b in layouts]
kinds = [(is_sharded(m), getattr(m, "placements", None) == getattr(b, "placements", None))
         for m, b in zip(moved, 4 * layouts)]
state = whole({"a": [layouts[1], 1], "b": (layouts[2],)})
back = placed_state(state["a"] and {"a": state["a"][0], "n": 1}, {"a": layouts[1]})

torch.manual_seed(0)
plain, net = MLP(3), MLP(3)
net.load_state_dict(plain.state_dict())
model, early = EpsModel(net, VPSDE()), EMA(EpsModel(net, VPSDE()), decay=0.5, warmup=False)
fully_shard(net, mesh=mesh)
late = EMA(model, decay=0.5, warmup=False)
for p, q in zip(net.parameters(), plain.parameters()):
    p.data.add_(0.1)
    q.data.add_(0.05)
for ema in (early, late):
    ema.update(model)
with torch.no_grad(), late.applied(model):
    t = torch.full((2,), 0.5)
    predicted = model.predict(torch.ones(2, 3), t).eps
    right = EpsModel(plain, VPSDE()).predict(torch.ones(2, 3), t).eps
save_checkpoint(f"{folder}/{rank}.run", model, ema=late)
dist.barrier()
fresh = EpsModel(MLP(3), VPSDE())
average = EMA(fresh)
load_checkpoint(f"{folder}/0.run", fresh, ema=average, restore_random=False)
load_checkpoint(f"{folder}/0.run", model, ema=late, restore_random=False)
networks = [ema.model.network.state_dict() for ema in (early, late, average)]
result = (
    [whole(m) for m in moved], kinds, state, whole(back), [whole(n) for n in networks],
    plain.state_dict(), (predicted, right),
)
"""


@pytest.mark.slow
def test_two_processes_share_weights(tmp_path) -> None:
    skip_without_sharding_on_cpu()
    x = torch.arange(6.0).view(3, 2)
    for moved, kinds, state, back, networks, right, predicted in run_in_two_processes(
        SHARDED, tmp_path
    ):
        assert all(torch.equal(m, x) for m in moved)
        assert kinds == [(b > 0, True) for _ in range(4) for b in range(4)]
        assert state["a"][1] == back["n"] == 1
        assert all(torch.equal(y, x) for y in (state["a"][0], state["b"][0], back["a"]))
        for network in networks:
            assert network.keys() == right.keys()
            for name, value in right.items():
                torch.testing.assert_close(network[name], value)
        torch.testing.assert_close(*predicted)
