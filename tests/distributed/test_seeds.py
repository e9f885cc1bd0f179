"""Seeds of ranks, and the random states that a checkpoint gives to each."""

import random

import numpy as np
import pytest
import torch

from diffusionkit import load_checkpoint, save_checkpoint
from diffusionkit.distributed import gather_random_states, seed_ranks, seeds
from diffusionkit.distributed._random_states import seeds_of
from diffusionkit.training import checkpointing


@pytest.fixture(autouse=True)
def global_states():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture
def place(monkeypatch):
    """Set the rank and the world size that the library finds."""

    def set_place(rank: int, world_size: int) -> None:
        for module in (seeds, checkpointing):
            monkeypatch.setattr(module, "rank_and_world_size", lambda: (rank, world_size))

    return set_place


def draws(*generators: torch.Generator) -> tuple[float, ...]:
    own = [float(torch.rand(1, generator=g)) for g in generators]
    return float(torch.rand(1)), random.random(), float(np.random.rand()), *own


def test_seeds_of_many_ranks_differ_also_in_the_bits_that_torch_uses() -> None:
    found = [seeds_of(7, rank) for rank in range(4096)]
    assert len({python for python, _, _ in found}) == 4096
    assert len({tuple(words) for _, words, _ in found}) == 4096
    assert len({number % 2**32 for _, _, number in found}) == 4096
    assert seeds_of(7, 5) != seeds_of(8, 5)


def test_ranks_are_seeded_by_seed_and_rank_alone(place) -> None:
    found = []
    for rank, world in ((0, 1), (0, 8), (1, 8), (7, 8)):
        place(rank, world)
        seed_ranks(3)
        found.append(draws())
    assert found[0] == found[1]
    assert all(len(set(column)) == 3 for column in zip(*found[1:], strict=True))


def test_each_rank_gets_its_own_state_and_new_ranks_new_ones(place, tmp_path) -> None:
    model, path, gathered, right = torch.nn.Linear(1, 1), tmp_path / "run.pt", [], []
    for rank in range(4):
        place(rank, 4)
        seed_ranks(1)
        loop = torch.Generator().manual_seed(10 + rank)
        gathered += gather_random_states({"loop": loop})
        right.append(draws(loop))
    place(0, 4)
    loop = torch.Generator().manual_seed(10)
    save_checkpoint(path, model, step=2, generators={"loop": loop}, random_states=gathered)
    for world in (1, 3, 4, 6):
        found = []
        for rank in range(world):
            place(rank, world)
            loop = torch.Generator().manual_seed(10 + rank)
            load_checkpoint(path, model, generators={"loop": loop})
            found.append(draws(loop))
        assert found[:4] == right[:world]
        assert all(len(set(column)) == world for column in zip(*found, strict=True))


def test_ranks_that_did_not_save_get_states_of_no_other(place, tmp_path) -> None:
    model, found = torch.nn.Linear(1, 1), {}
    place(0, 8)
    shared = torch.Generator().manual_seed(5)
    for step in (1, 2):  # of a generator that has not moved, another step has other noise
        torch.manual_seed(0)
        save_checkpoint(tmp_path / f"{step}.pt", model, step=step, generators={"shared": shared})
    for step in (1, 2, 2):
        for rank in range(8):
            place(rank, 8)
            shared = torch.Generator().manual_seed(5)
            load_checkpoint(tmp_path / f"{step}.pt", model, generators={"shared": shared})
            drawn = draws(shared)
            assert found.setdefault((step, rank), drawn) == drawn
    columns = list(zip(*(found[key] for key in found if key != (2, 0)), strict=True))
    assert all(len(set(column)) == 15 for column in columns[:3])
    assert len(set(columns[3])) == 1


def test_states_of_another_number_of_ranks_are_refused(tmp_path) -> None:
    model, states = torch.nn.Linear(1, 1), gather_random_states()
    with pytest.raises(ValueError, match="random_states: expected 1 ranks, got 2"):
        save_checkpoint(tmp_path / "run.pt", model, random_states=states * 2)
    with pytest.raises(TypeError, match="random_states: expected those of gather_random_states"):
        save_checkpoint(tmp_path / "run.pt", model, random_states=[{"torch": 1}])
