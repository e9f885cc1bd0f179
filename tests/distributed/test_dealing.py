"""Work that processes share: equal lists, help for slow processes, and death of one."""

from collections import Counter
from itertools import chain

import pytest
import torch
from support.processes import run_in_two_processes

from diffusionkit.distributed._dealing import Dealer, of_first, share_of
from diffusionkit.metrics import load_shards, sample_to_shards


def draw(n, generators):
    return torch.stack([2 * torch.rand(3, 4, 4, generator=g) - 1 for g in generators])


@pytest.mark.parametrize(("pieces", "world"), [(0, 3), (1, 4), (6, 3), (23, 5), (40, 1)])
def test_fixed_shares_are_a_partition_into_equal_parts(pieces, world) -> None:
    shares = [share_of(pieces, rank, world) for rank in range(world)]
    assert sorted(chain(*shares)) == list(range(pieces))
    assert {len(share) for share in shares} <= {pieces // world, -(-pieces // world)}


@pytest.mark.parametrize(("before", "now"), [(4, 2), (6, 3), (2, 4)])
def test_what_dead_processes_left_is_shared_evenly_by_another_number(before, now) -> None:
    """By `number % world` one process of two would have all that ranks 1 and 3 of 4 left."""
    left = {i for rank in range(1, before, 2) for i in share_of(2000, rank, before)}
    assert len(left) == 1000
    shares = [len(left & set(share_of(2000, rank, now))) for rank in range(now)]
    assert all(abs(n - 1000 / now) < 5 * (1000 / now) ** 0.5 for n in shares), shares


def test_explicit_ranks_need_no_group(tmp_path) -> None:
    drawn = Counter()
    for world, ranks in ((4, (0, 2)), (2, (0, 1))):  # ranks 1 and 3 died

        def counted(n, generators, world=world):
            drawn[world] += 1
            return draw(n, generators)

        for rank in ranks:
            arguments = {"batch_size": 2, "rank": rank, "world_size": world, "progress": False}
            sample_to_shards(counted, 40, tmp_path, **arguments)
    assert drawn == {4: 10, 2: 10}
    sample_to_shards(draw, 40, tmp_path / "one", batch_size=5, progress=False)
    whole = torch.cat(list(load_shards(tmp_path / "one")))
    assert torch.equal(torch.cat(list(load_shards(tmp_path))), whole)


def test_alone() -> None:
    dealer = Dealer(lambda: [2, 5])
    assert list(dealer.take(dealer.own)) == [2, 5]
    assert list(dealer.left(lambda piece: False)) == []
    dealer.leave()
    with pytest.raises(ZeroDivisionError):
        of_first(lambda: 1 // 0)


PROGRAM = """
import os, time
from pathlib import Path
from types import SimpleNamespace
from diffusionkit import evaluate_bits_per_dim
from diffusionkit.distributed import _dealing
from diffusionkit.metrics import load_shards, sample_to_shards

_dealing._SHORTEST, _dealing._LEAVING = 0.5, 1.0  # seconds
calls, slow = [], 0.0
def draw(n, generators):
    calls.append(n)
    time.sleep(slow)
    return torch.stack([2 * torch.rand(3, 4, 4, generator=g) - 1 for g in generators])

def sample(name, **options):
    sample_to_shards(draw, 40, f"{folder}/{name}", batch_size=2, progress=False, **options)
    return torch.cat(list(load_shards(f"{folder}/{name}")))

# Only pieces of rank 0 are missing, one of them is damaged.
equal = sample("equal")
dist.barrier()
shares, calls = len(calls), []
if rank == 0:
    for number in range(0, 16, 2):
        file = Path(f"{folder}/equal/{2 * number:08d}.npy")
        file.write_bytes(file.read_bytes()[:-1]) if number == 4 else file.unlink()
dist.barrier()
again = sample("equal")
resumed, calls = len(calls), []

slow = 0.0 if rank == 0 else 0.2  # rank 0 helps
helped = sample("slow")
most, calls, slow = len(calls), [], 0.0

errors = []
for options in ({"seed": 1}, {"settings": {"a": 1}}):
    try:
        sample("equal", **options)
    except ValueError as error:
        errors.append(str(error))

def likelihood(x, generator):
    calls.append(len(x))
    if rank == 1 and len(calls) == 2:  # dies with a piece begun and others to do
        torch.save(result, f"{folder}/{rank}.pt")
        os._exit(0)
    return SimpleNamespace(nats=x.double().square().sum(1))

x = torch.arange(36.0).view(12, 3)
result = shares, resumed, most, errors, equal, again, helped, None
bits = evaluate_bits_per_dim(likelihood, x, batch_size=2, path=f"{folder}/bits", progress=False)
result = *result[:-1], bits.bits
torch.save(result, f"{folder}/{rank}.pt")
os._exit(0)  # the group is broken
"""


def test_processes_share_what_is_missing_and_do_the_work_of_slow_and_dead_ones(tmp_path) -> None:
    found = run_in_two_processes(PROGRAM, tmp_path)
    shares, resumed, most, errors, *samples = zip(*found, strict=True)
    assert shares == (10, 10)
    assert resumed == (4, 4)
    assert sum(most) == 20  # nothing is drawn twice
    assert most[0] >= 13
    assert errors[0] == errors[1]
    assert len(errors[0]) == 2
    assert all("settings: expected" in text for text in errors[0])
    sample_to_shards(draw, 40, tmp_path / "one", batch_size=5, progress=False)
    whole = torch.cat(list(load_shards(tmp_path / "one")))
    for equal in (x for pair in samples[:-1] for x in pair):
        assert torch.equal(equal, whole)
    bits, none = samples[-1]
    assert none is None
    x = torch.arange(36.0, dtype=torch.float64).view(12, 3)
    expected = x.square().sum(1, keepdim=True) / 3 / torch.tensor(2.0).double().log()
    torch.testing.assert_close(bits, expected)
