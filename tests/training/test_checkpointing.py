"""Training state in a file: resuming, damage, and what is refused."""

import copy
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusionkit import (
    EMA,
    VPSDE,
    CheckpointError,
    EpsModel,
    ScoreMatching,
    clipped_step,
    linear_warmup,
    load_checkpoint,
    save_checkpoint,
)


class Network(nn.Module):
    def __init__(self, width: int = 8, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, width, bias=bias), nn.BatchNorm1d(width)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(width, 3)

    def forward(self, x, label):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


class Run:
    """A training run with everything that has a state."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = EpsModel(Network(**options), VPSDE())
        self.ema = EMA(self.model, decay=0.9)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.scheduler = linear_warmup(self.optimizer, steps=5)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.step = 0

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "ema": self.ema,
            "optimizer": self.optimizer,
            "stateful": {"scheduler": self.scheduler},
            "generators": {"loop": self.generator},
        }

    def train(self, steps: int) -> list[float]:
        """Draw data from Python, numpy and torch, times and noise from the loop's generator."""
        losses = []
        for _ in range(steps):
            x0 = torch.randn(6, 3) + random.random() + np.random.rand()
            loss = ScoreMatching()(self.model, x0, generator=self.generator).mean()
            loss.backward()
            clipped_step(self.optimizer)
            self.scheduler.step()
            self.ema.update(self.model)
            self.step += 1
            losses.append(loss.item())
        return losses

    def save(self, path: Path, **options: Any) -> None:
        save_checkpoint(path, self.model, step=self.step, **{**self.parts, **options})

    def load(self, path: Path, **options: Any) -> Any:
        return load_checkpoint(path, self.model, **{**self.parts, **options})

    def states(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "generator": self.generator.get_state(),
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
            }
        )


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(autouse=True)
def global_states():
    """Leave the global generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """The checkpoint of a run of two steps."""
    run, path = Run(), tmp_path_factory.mktemp("run") / "run.pt"
    run.train(2)
    run.save(path, extra={"epoch": 7, "note": "x", "mean": torch.ones(2)})
    return path.read_bytes()


@pytest.fixture
def saved(tmp_path, content) -> Path:
    """A file with the checkpoint of a run of two steps."""
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    return path


def refused(path: Path, match: str, run: Run | None = None, **options: Any) -> None:
    """Check that a file is refused with a CheckpointError, and that nothing was changed."""
    run = Run(seed=5) if run is None else run
    before = run.states()
    with pytest.raises(CheckpointError, match=match):
        run.load(path, **options)
    assert same(run.states(), before)


def test_resuming_continues_bit_for_bit(tmp_path) -> None:
    whole = Run()
    whole.train(3)
    whole.save(tmp_path / "run.pt")
    rest = whole.train(3)
    resumed = Run(seed=9)
    random.seed(9)
    checkpoint = resumed.load(tmp_path / "run.pt")
    resumed.step = checkpoint.step
    assert resumed.train(3) == rest
    assert resumed.step == 6
    assert same(resumed.states(), whole.states())


def test_saving_changes_nothing(tmp_path) -> None:
    run = Run()
    run.train(1)
    before = run.states()
    run.save(tmp_path / "run.pt")
    assert same(run.states(), before)


def test_step_and_extra_come_back(saved) -> None:
    checkpoint = Run().load(saved)
    assert checkpoint.step == 2
    assert checkpoint.extra["epoch"] == 7
    assert checkpoint.extra["note"] == "x"
    assert torch.equal(checkpoint.extra["mean"], torch.ones(2))


def test_parts_may_be_left_out(saved) -> None:
    run = Run(seed=5)
    before = run.states()
    load_checkpoint(saved, run.model, restore_random=False)
    after = run.states()
    assert not same(after.pop("model"), before.pop("model"))
    assert same(after, before)


def test_file_has_the_usual_permissions_and_no_company(tmp_path) -> None:
    Run().save(tmp_path / "run.pt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "run.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["plain", "run.pt"]


def test_path_may_be_a_string(tmp_path) -> None:
    save_checkpoint(str(tmp_path / "a"), nn.Linear(1, 1), step=3)
    assert load_checkpoint(str(tmp_path / "a"), nn.Linear(1, 1)).step == 3


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_previous_file(saved, monkeypatch, error) -> None:
    old = saved.read_bytes()

    def crash(payload, file):
        file.write(b"PK half a file")
        raise error

    run = Run()
    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(type(error)):
        run.save(saved)
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == ["run.pt"]


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pt"):
        load_checkpoint("nowhere.pt", nn.Linear(1, 1))


@pytest.mark.parametrize("twentieths", range(20))
def test_truncated(saved, twentieths) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) * twentieths // 20])
    refused(saved, "expected a checkpoint written by save_checkpoint, got")


def test_last_byte_missing(saved) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    refused(saved, "expected a checkpoint written by save_checkpoint, got")


def test_one_bit_flipped_is_an_error_or_harmless(saved) -> None:
    """Padding between the records of the file has no meaning; everything else has a checksum."""
    whole, draw = saved.read_bytes(), random.Random(0)
    run, errors = Run(seed=5), 0
    run.load(saved)
    good = run.states()
    ends = [*range(0, 64), *range(len(whole) - 100, len(whole))]  # headers and directory
    for position in ends + [draw.randrange(len(whole)) for _ in range(200)]:
        data = bytearray(whole)
        data[position] ^= 1 << draw.randrange(8)
        saved.write_bytes(data)
        try:
            run.load(saved)
        except CheckpointError:
            errors += 1
        assert same(run.states(), good)
    assert errors > 150


def test_foreign_files(tmp_path) -> None:
    path, expected = tmp_path / "x", "expected a checkpoint written by save_checkpoint, got"
    for content in (b"", b"hello\n" * 100, b"\x80\x04K\x01.", random.Random(0).randbytes(4096)):
        path.write_bytes(content)
        refused(path, expected)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(path, expected)


def test_foreign_torch_files(tmp_path) -> None:
    path = tmp_path / "x.pt"
    for content in (torch.ones(3), {"model": {}}, nn.Linear(3, 3).state_dict(), [1], None):
        torch.save(content, path)
        refused(path, "got a foreign file")
    torch.save(nn.Linear(3, 3), path)  # a pickled module
    refused(path, "expected a checkpoint written by save_checkpoint, got")
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    refused(path, "expected a checkpoint written by save_checkpoint, got")


def test_another_version(saved) -> None:
    state = torch.load(saved, weights_only=True)
    torch.save({**state, "version": 99}, saved)
    refused(saved, "expected version 1, got 99")


@pytest.mark.parametrize(
    "part", ["model", "ema", "optimizer", "stateful", "generators", "random", "step"]
)
@pytest.mark.parametrize("odd", ["absent", 7.5, {"odd": 1}, torch.ones(2)], ids=repr)
def test_a_file_with_an_odd_part(saved, part, odd) -> None:
    state = torch.load(saved, weights_only=True)
    del state[part]
    if odd != "absent":
        state[part] = odd
    torch.save(state, saved)
    refused(saved, "expected|does not fit")


class Payload:
    """Unpickled by code that trusts it, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickles_are_not_run(saved, tmp_path) -> None:
    state, victim = torch.load(saved, weights_only=True), tmp_path / "victim"
    for content in (Payload(victim), {**state, "extra": {"x": Payload(victim)}}):
        torch.save(content, saved)
        refused(saved, "expected a checkpoint written by save_checkpoint, got UnpicklingError")
        torch.save(content, saved, _use_new_zipfile_serialization=False)
        refused(saved, "expected a checkpoint written by save_checkpoint, got")
    assert not victim.exists()
    torch.load(saved, weights_only=False)  # the trap works
    assert victim.exists()


def test_missing_extra_and_misshapen_tensors_are_listed(saved) -> None:
    refused(saved, r"model does not fit.*unexpected network\.first\.bias", Run(bias=False))
    refused(saved, r"first\.weight: expected shape \(4, 3\), got \(8, 3\)", Run(width=4))
    Run(bias=False).save(saved)
    refused(saved, r"model does not fit.*missing network\.first\.bias")


def test_misshapen_averages_are_listed(saved) -> None:
    run = Run(seed=5)
    run.ema = EMA(EpsModel(Network(width=4), VPSDE()))
    refused(saved, r"ema does not fit.*first\.bias: expected shape \(4,\), got \(8,\)", run)


def test_a_part_that_was_not_saved(saved) -> None:
    run = Run()
    refused(saved, r"expected stateful \['scaler'\], got \['scheduler'\]",
            stateful={"scaler": run.scheduler})  # fmt: skip
    refused(saved, r"expected generators \['noise'\], got \['loop'\]",
            generators={"noise": run.generator})  # fmt: skip
    run.save(saved, ema=None)
    refused(saved, "expected a checkpoint with ema, got one without")
    run.save(saved, optimizer=None)
    refused(saved, "expected a checkpoint with optimizer, got one without")
    run.save(saved, generators=None)
    refused(saved, r"expected generators \['loop'\], got none")


def test_another_optimizer(saved) -> None:
    run = Run(seed=5)
    sgd = torch.optim.SGD(run.model.parameters())
    match = r"optimizer does not fit: expected SGD with groups of \[6\].*got Adam with groups"
    refused(saved, match, run, optimizer=sgd)
    fewer = torch.optim.Adam(run.model.network.last.parameters())
    refused(saved, r"expected Adam with groups of \[2\] tensors, got Adam with groups of \[6\]",
            run, optimizer=fewer)  # fmt: skip


class Odd:
    """Something with a state that refuses every other state."""

    def state_dict(self):
        return {"odd": 1}

    def load_state_dict(self, state):
        if state != {"odd": 1}:
            raise RuntimeError("no")


def test_what_was_loaded_before_a_later_part_failed_is_undone(saved) -> None:
    run = Run(seed=5)
    parts = {"scheduler": run.scheduler, "odd": Odd()}
    state = torch.load(saved, weights_only=True)
    state["stateful"]["odd"] = {"other": 1}
    torch.save(state, saved)
    refused(saved, "expected states that fit the objects given, got RuntimeError: no",
            run, stateful=parts)  # fmt: skip


@pytest.mark.parametrize(
    "unsafe",
    [nn.Linear(1, 1), lambda: 0, VPSDE(), np.ones(2), Path("a")],
    ids=["module", "function", "process", "array", "path"],
)
def test_what_cannot_be_read_back_safely_is_refused_when_saving(saved, unsafe) -> None:
    old = saved.read_bytes()
    with pytest.raises(ValueError, match=r"expected tensors, numbers, .* got something that"):
        Run().save(saved, extra={"part": unsafe})
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == ["run.pt"]


def test_global_generators_are_restored_only_when_asked(saved) -> None:
    run = Run()

    def states() -> list[Any]:
        return [torch.get_rng_state(), np.random.get_state(), random.getstate()]

    before = states()
    run.load(saved, restore_random=False)
    assert same(states(), before)
    run.load(saved)
    assert not any(map(same, states(), before))
