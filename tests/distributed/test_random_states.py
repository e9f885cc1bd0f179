"""States of random generators: checked before any is set."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from diffusionkit import CheckpointError, load_checkpoint, save_checkpoint
from diffusionkit.distributed._random_states import check_torch_state, own_random_states
from diffusionkit.training import checkpointing


@pytest.fixture(autouse=True)
def global_states():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def changed(value, place: int, new):
    return type(value)([*value[:place], new, *value[place + 1 :]])


def wrong_states(good):
    """Wrong states by the name of the generator."""
    version, numbers, gauss = good["python"]
    for new in (2, None, "3"):
        yield "python", (new, numbers, gauss)
    for position in (-1, 625, 2**63, 1.0, True, None):
        yield "python", (version, (*numbers[:-1], position), gauss)
    for key in (-1, 2**32, 2.0, None):
        yield "python", (version, changed(numbers, 7, key), gauss)
    for new in (math.nan, math.inf, "x", 1):
        yield "python", (version, numbers, new)
    yield "python", (version, numbers[:-1], gauss)
    yield "python", (version, (0,) * 624 + (1,), gauss)
    keys, position, has_gauss, gauss = good["numpy"]
    for new in (-1, 625, 2**31, 2**40, -(2**31), 1.5, True, None):
        yield "numpy", (keys, new, has_gauss, gauss)
    for key in (-1, 2**32, 2.0, None, "x"):
        yield "numpy", (changed(keys, 0, key), position, has_gauss, gauss)
    for part in (keys[:-1], [*keys, 1], [], None, [0] * 624):
        yield "numpy", (part, position, has_gauss, gauss)
    for new in (2, -1, None, 0.0):
        yield "numpy", (keys, position, new, gauss)
    for new in (math.nan, math.inf, None, 1):
        yield "numpy", (keys, position, 1, new)
    state = good["torch"]
    for new in (
        state[:-1],
        state.long(),
        state.view(2, -1),
        state.tolist(),
        torch.zeros_like(state),
    ):
        yield "torch", new
    for new in (None, [1], [torch.zeros(3, dtype=torch.uint8)], [torch.zeros(16)]):
        yield "cuda", new
    for name in ("python", "numpy", "torch"):
        for new in (None, 3, "x", (), [], {}):
            yield name, new


def test_every_wrong_state_is_refused_by_name_and_changes_nothing(monkeypatch, tmp_path) -> None:
    model = torch.nn.Linear(1, 1)
    save_checkpoint(tmp_path / "run.pt", model)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    count = 0
    good = content["random"][0]
    for name, wrong in wrong_states(good):
        state = {**content, "random": {0: {**good, name: wrong}}}
        monkeypatch.setattr(checkpointing, "read_torch", lambda *_, state=state, **__: state)
        before = copy.deepcopy(own_random_states())
        with pytest.raises(CheckpointError, match=rf"run\.pt: random\['{name}'\]"):
            load_checkpoint("run.pt", model)
        after = own_random_states()
        assert torch.equal(after.pop("torch"), before.pop("torch"))
        assert str(after) == str(before)
        count += 1
    assert count > 60


def test_flipped_bytes_of_torch_are_refused_or_draw_finite_numbers() -> None:
    """A wrong place in the state would read foreign memory."""
    state, draw = torch.Generator().manual_seed(0).get_state(), random.Random(0)
    ends = [*range(24), *range(len(state) - 32, len(state))]
    refused = 0
    for _ in range(1500):
        damaged = state.clone()
        for _ in range(draw.choice([1, 4, 64])):
            damaged[draw.choice([draw.choice(ends), draw.randrange(len(state))])] = draw.randrange(
                256
            )
        try:
            check_torch_state(damaged, torch.Generator(), "state")
        except ValueError:
            refused += 1
            continue
        generator = torch.Generator()
        generator.set_state(damaged)
        assert bool(torch.rand(2000, generator=generator).isfinite().all())
        for dtype in (torch.float64, torch.float32):
            assert bool(torch.randn(3, generator=generator, dtype=dtype).isfinite().all())
    assert 100 < refused < 1400


def test_states_of_own_generators_are_checked(tmp_path, monkeypatch) -> None:
    model, generator = torch.nn.Linear(1, 1), torch.Generator().manual_seed(3)
    save_checkpoint(tmp_path / "run.pt", model, generators={"loop": generator})
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    for wrong in (
        None,
        3,
        content["random"][0]["torch"][:-1],
        torch.zeros(5056, dtype=torch.uint8),
    ):
        state = {**content, "generators": {"loop": {0: wrong}}}
        monkeypatch.setattr(checkpointing, "read_torch", lambda *_, state=state, **__: state)
        before = generator.get_state()
        with pytest.raises(CheckpointError, match=r"generators\['loop'\]: expected"):
            load_checkpoint("run.pt", model, generators={"loop": generator})
        assert torch.equal(generator.get_state(), before)


def test_another_global_generator_of_numpy_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(np.random, "get_state", lambda: {"bit_generator": "PCG64", "state": {}})
    with pytest.raises(ValueError, match="numpy: expected its global generator to be MT19937"):
        own_random_states()
