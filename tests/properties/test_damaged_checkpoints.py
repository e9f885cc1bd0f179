"""Any single corruption of any entry of a checkpoint: refused in words, and nothing changes."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.nested import same
from torch import Tensor, nn

from diffusionkit import (
    EMA,
    CheckpointError,
    DDPMChain,
    EpsModel,
    PowerEMA,
    ScoreMatching,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit.training import LossSecondMomentTimes, ReferenceBatches, checkpointing


class Network(nn.Module):
    """A network with parameters, and with buffers of numbers, counts and an infinite mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x))) + torch.exp(self.mask[1])


class Run:
    """A training run with everything that a checkpoint may hold."""

    def __init__(self, seed: int = 0, average: type = EMA) -> None:
        torch.manual_seed(seed)
        self.model = EpsModel(Network(), DDPMChain([0.3, 0.4, 0.5, 0.6]))
        self.ema = average(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer)
        self.objective = ScoreMatching(times=LossSecondMomentTimes(history=2))
        self.batches = ReferenceBatches(torch.linspace(-1, 1, 60).view(30, 2), 4, 8)
        self.generator = torch.Generator().manual_seed(seed + 1)

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "ema": self.ema,
            "optimizer": self.optimizer,
            "objective": self.objective,
            "stateful": {
                "scheduler": self.scheduler, "plateau": self.plateau, "batches": self.batches,
            },
            "generators": {"loop": self.generator},
        }  # fmt: skip

    def train(self, steps: int) -> list[float]:
        losses = []
        flow = iter(self.batches)
        for _ in range(steps):
            x0, _ = next(flow)
            loss = self.objective(self.model, x0, generator=self.generator).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.plateau.step(loss.detach())
            self.ema.update(self.model)
            losses.append(loss.item())
        return losses

    def states(self) -> Any:
        stateful = {name: part.state_dict() for name, part in self.parts["stateful"].items()}
        return copy.deepcopy(
            (
                dict(self.model.state_dict()), self.ema.state_dict(), self.optimizer.state_dict(),
                self.objective.times.state_dict(), stateful, self.generator.get_state(),
                random.getstate(), np.random.get_state(), torch.get_rng_state(),
            )
        )  # fmt: skip


@pytest.fixture(autouse=True)
def global_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def entries(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a nested value; of what is numbered the first and the last."""
    yield path
    if not isinstance(value, (dict, list, tuple)):
        return
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    numbered = len(pairs) > 2 and all(isinstance(key, int) for key, _ in pairs)
    for key, part in [pairs[0], pairs[-1]] if numbered else pairs:
        yield from entries(part, *path, key)


def replaced(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A nested value with one entry replaced, or removed for `REMOVED`."""
    if not path:
        return change
    key, *rest = path
    if isinstance(value, dict):
        new = replaced(value[key], tuple(rest), change)
        items = {k: new if k == key else v for k, v in value.items()}
        if new is REMOVED:
            del items[key]
        return Counter(items) if isinstance(value, Counter) else items
    parts = list(value)
    parts[key] = replaced(parts[key], tuple(rest), change)
    return type(value)(part for part in parts if part is not REMOVED)


REMOVED = object()


def found(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def corruptions(value: Any) -> list[Any]:
    """Values that are wrong in the place of another, whatever it means."""
    if isinstance(value, Tensor):
        wrong = [value.to(torch.complex64), value.bool(), value.unsqueeze(0), value.to("meta")]
        wrong += [value.double() if value.dtype != torch.float64 else value.half(), 1.5, "x"]
        if value.is_floating_point():
            nan = value.clone()
            nan.view(-1)[-1:] = math.nan
            wrong += [nan, value.long(), value.to(torch.float8_e4m3fn)]
            finite = value.isfinite().all()
            wrong += [value.where(value != value.view(-1)[0], math.inf)] if finite else []
        return [*wrong, REMOVED]
    if isinstance(value, bool):
        return [not value, "x", 3.5, REMOVED]
    if isinstance(value, (int, float)):
        return [math.nan, "x", [1], torch.ones(2, 2), {}]
    if isinstance(value, str):
        return [3, [value], {}]
    if isinstance(value, (dict, list, tuple)):
        return [3.5, "x", torch.ones(2, 2)]
    return ["x"]


# Entries whose values no check can tell from right ones, or that do not matter.
FREE = (
    ("extra",),
    ("about",),
    ("description",),  # which load_model reads
    ("stateful", "scheduler"),
    ("stateful", "plateau"),
    ("random", 0, "cuda"),
    ("format",),
)
# Options of AdamW that say how it computes: those of the running one hold.
HOW = {"foreach", "fused", "capturable", "differentiable", "initial_lr"}


@pytest.fixture(scope="module", params=[EMA, pytest.param(PowerEMA, marks=pytest.mark.slow)])
def damaged(request, tmp_path_factory) -> tuple[Any, Any, Any]:
    run = Run(average=request.param)
    run.train(3)
    path = tmp_path_factory.mktemp("run") / "run.pt"
    save_checkpoint(path, run.model, step=3, **run.parts)
    return path, torch.load(path, weights_only=True), request.param


def is_free(path: tuple[Any, ...]) -> bool:
    return any(path[: len(free)] == free for free in FREE) or bool(HOW & {*map(str, path)})


def refusal(run: Run, content: Any) -> str:
    """The text of the error that a file's content raises, empty if it loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "read_torch", lambda *_, **__: content)
        try:
            load_checkpoint("run.pt", run.model, **run.parts)
        except CheckpointError as error:
            return str(error)
    return ""


def named(place: tuple[Any, ...], text: str) -> bool:
    """Whether an error names an entry, of a generator's states by rank the generator."""
    return str(place[-2] if place[0] == "generators" else place[-1]) in text


def test_any_corrupted_entry_is_refused_and_changes_nothing(damaged) -> None:
    _, content, average = damaged
    run = Run(seed=5, average=average)
    run.train(2)
    before, count, accepted, unnamed = run.states(), 0, [], []
    for place in entries(content):
        if not place or is_free(place):
            continue
        for change in corruptions(found(content, place)):
            text = refusal(run, replaced(content, place, change))
            count += 1
            # An option of its optimizer that a file lacks is that of the running one.
            if not text and not (change is REMOVED and "param_groups" in place):
                accepted.append((place, change))
            if not text:
                run = Run(seed=5, average=average)
                run.train(2)
                before = run.states()
            elif isinstance(found(content, place), Tensor) and not named(place, text):
                unnamed.append((place, text))
        assert same(run.states(), before), place
    assert not accepted
    assert not unnamed
    assert count > 400


def test_a_sound_file_loads_and_the_run_continues_bit_for_bit(tmp_path, damaged) -> None:
    average = damaged[2]
    whole = Run(average=average)
    whole.train(3)
    save_checkpoint(tmp_path / "run.pt", whole.model, step=3, **whole.parts)
    resumed = Run(seed=7, average=average)
    assert load_checkpoint(tmp_path / "run.pt", resumed.model, **resumed.parts).step == 3
    assert same(resumed.states(), whole.states())
    # A new iterator of the resumed run takes the rest of the epoch, one of the other the next.
    whole.batches.load_state_dict(whole.batches.state_dict())
    assert resumed.train(3) == whole.train(3)
    assert same(resumed.states(), whole.states())
