"""Training state in a file: resuming, damage and rejected values."""

import copy
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.nested import same
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
    """A training run with every object that has state."""

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
        """Draw data from the global generators, times and noise from the loop's generator."""
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


@pytest.fixture(autouse=True)
def global_states():
    """Seed the global generators, and restore them afterwards."""
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
    """The content of a checkpoint after two steps."""
    run, path = Run(), tmp_path_factory.mktemp("run") / "run.pt"
    run.train(2)
    run.save(path, extra={"epoch": 7, "note": "x", "mean": torch.ones(2)})
    return path.read_bytes()


@pytest.fixture
def saved(tmp_path, content) -> Path:
    """A checkpoint file after two steps."""
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    return path


def rejected(path: Path, match: str, run: Run | None = None, **options: Any) -> None:
    """Check that a file raises CheckpointError and that no state has changed."""
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


def test_step_and_extra_are_returned(saved) -> None:
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


def test_file_has_default_permissions_and_no_temporary_file_remains(tmp_path) -> None:
    Run().save(tmp_path / "run.pt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "run.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["plain", "run.pt"]


def test_path_may_be_a_string(tmp_path) -> None:
    save_checkpoint(str(tmp_path / "a"), nn.Linear(1, 1), step=3)
    assert load_checkpoint(str(tmp_path / "a"), nn.Linear(1, 1)).step == 3


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_crash_while_writing_leaves_the_previous_file(saved, monkeypatch, error) -> None:
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


def test_missing_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pt"):
        load_checkpoint("nowhere.pt", nn.Linear(1, 1))


@pytest.mark.parametrize("twentieths", range(20))
def test_truncated_files_are_rejected(saved, twentieths) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) * twentieths // 20])
    rejected(saved, "expected a checkpoint written by save_checkpoint, got")


def test_missing_last_byte_is_detected(saved) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    rejected(saved, "expected a checkpoint written by save_checkpoint, got")


def test_flipped_bit_is_detected_or_harmless(saved) -> None:
    """Only the padding between the records of the file has no checksum, and no meaning."""
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


def test_foreign_files_are_rejected(tmp_path) -> None:
    path, expected = tmp_path / "x", "expected a checkpoint written by save_checkpoint, got"
    for content in (b"", b"hello\n" * 100, b"\x80\x04K\x01.", random.Random(0).randbytes(4096)):
        path.write_bytes(content)
        rejected(path, expected)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    rejected(path, expected)


def test_foreign_torch_files_are_rejected(tmp_path) -> None:
    path = tmp_path / "x.pt"
    for content in (torch.ones(3), {"model": {}}, nn.Linear(3, 3).state_dict(), [1], None):
        torch.save(content, path)
        rejected(path, "got another kind of file")
    torch.save(nn.Linear(3, 3), path)  # a pickled module
    rejected(path, "expected a checkpoint written by save_checkpoint, got")
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    rejected(path, "expected a checkpoint written by save_checkpoint, got")


def test_other_versions_are_rejected(saved) -> None:
    state = torch.load(saved, weights_only=True)
    torch.save({**state, "version": 99}, saved)
    rejected(saved, "expected version 4, got 99")


@pytest.mark.parametrize(
    "part", ["model", "ema", "optimizer", "stateful", "generators", "random", "step"]
)
@pytest.mark.parametrize("odd", ["absent", 7.5, {"odd": 1}, torch.ones(2)], ids=repr)
def test_invalid_or_missing_parts_are_rejected(saved, part, odd) -> None:
    state = torch.load(saved, weights_only=True)
    del state[part]
    if odd != "absent":
        state[part] = odd
    torch.save(state, saved)
    rejected(saved, "expected|does not fit")


class Payload:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickles_do_not_run(saved, tmp_path) -> None:
    state, victim = torch.load(saved, weights_only=True), tmp_path / "victim"
    for content in (Payload(victim), {**state, "extra": {"x": Payload(victim)}}):
        torch.save(content, saved)
        rejected(
            saved, "expected a checkpoint written by save_checkpoint, got one that cannot be read"
        )
        torch.save(content, saved, _use_new_zipfile_serialization=False)
        rejected(saved, "expected a checkpoint written by save_checkpoint, got")
    assert not victim.exists()
    torch.load(saved, weights_only=False)  # the trap works
    assert victim.exists()


def test_missing_extra_and_misshapen_tensors_are_listed(saved) -> None:
    rejected(saved, r"model does not fit.*unexpected network\.first\.bias", Run(bias=False))
    rejected(saved, r"first\.weight: expected shape \(4, 3\), got \(8, 3\)", Run(width=4))
    Run(bias=False).save(saved)
    rejected(saved, r"model does not fit.*missing network\.first\.bias")


def test_misshapen_averages_are_listed(saved) -> None:
    run = Run(seed=5)
    run.ema = EMA(EpsModel(Network(width=4), VPSDE()))
    rejected(saved, r"ema does not fit.*first\.bias: expected shape \(4,\), got \(8,\)", run)


def test_parts_that_were_not_saved_are_rejected(saved) -> None:
    run = Run()
    rejected(saved, r"expected stateful \['scaler'\], got \['scheduler'\]",
            stateful={"scaler": run.scheduler})  # fmt: skip
    rejected(saved, r"expected generators \['noise'\], got \['loop'\]",
            generators={"noise": run.generator})  # fmt: skip
    run.save(saved, ema=None)
    rejected(saved, "expected a checkpoint with ema, got one without")
    run.save(saved, optimizer=None)
    rejected(saved, "expected a checkpoint with optimizer, got one without")
    run.save(saved, generators=None)
    rejected(saved, r"expected generators \['loop'\], got none")


def test_other_optimizers_are_rejected(saved) -> None:
    run = Run(seed=5)
    sgd = torch.optim.SGD(run.model.parameters())
    match = r"optimizer: expected SGD with groups of \[6\].*got Adam with groups"
    rejected(saved, match, run, optimizer=sgd)
    fewer = torch.optim.Adam(run.model.network.last.parameters())
    rejected(saved, r"expected Adam with groups of \[2\] tensors, got Adam with groups of \[6\]",
            run, optimizer=fewer)  # fmt: skip


class Odd:
    """An object that accepts only its own state."""

    def state_dict(self):
        return {"odd": 1}

    def load_state_dict(self, state):
        if state != {"odd": 1}:
            raise RuntimeError("no")


def test_failed_load_restores_the_parts_already_loaded(saved) -> None:
    run = Run(seed=5)
    parts = {"scheduler": run.scheduler, "odd": Odd()}
    state = torch.load(saved, weights_only=True)
    state["stateful"]["odd"] = {"other": 1}
    torch.save(state, saved)
    rejected(saved, "expected states that fit the objects given, got RuntimeError: no",
            run, stateful=parts)  # fmt: skip


@pytest.mark.parametrize(
    "unsafe",
    [nn.Linear(1, 1), lambda: 0, VPSDE(), np.ones(2), Path("a")],
    ids=["module", "function", "process", "array", "path"],
)
def test_unsafe_values_are_rejected_when_saving(saved, unsafe) -> None:
    old = saved.read_bytes()
    with pytest.raises(ValueError, match=r"expected tensors, numbers, .* got values that"):
        Run().save(saved, extra={"part": unsafe})
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == ["run.pt"]


def test_global_generators_are_restored_only_on_request(saved) -> None:
    run = Run()

    def states() -> list[Any]:
        return [torch.get_rng_state(), np.random.get_state(), random.getstate()]

    before = states()
    run.load(saved, restore_random=False)
    assert same(states(), before)
    run.load(saved)
    assert not any(map(same, states(), before))
