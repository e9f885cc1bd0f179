"""train.py in one process: what a restart goes on from, and what it refuses."""

import json
import os
import resource
import signal

import pytest
import torch
from support.image_runs import arguments, equal, save_squares, weights

from diffusionkit.data import save_images


@pytest.fixture
def train(program):
    pytest.importorskip("PIL")
    return program("train")


@pytest.fixture
def run(train, tmp_path):
    """Run the program with changes of settings; return the folder of the run."""

    def run(out, *changes, **options):
        words = arguments(tmp_path, out, *changes)
        for name, value in options.items():
            words[words.index(f"--{name}") + 1] = str(value)
        train.main(words)
        return tmp_path / out

    return run


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [(line["step"], line["loss"], line["gradient"]) for line in log(out)]


def test_a_run_logs_draws_and_keeps_its_last_checkpoints(run, capsys):
    out = run("a", "run.keep=2", "run.snapshot_every=3", "run.precision=bfloat16")
    assert [step for step, *_ in losses(out)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-00000004.pt",
        "step-00000006.pt",
    ]
    pictures = sorted(path.name for path in (out / "snapshots").iterdir())
    assert pictures == ["step-00000003.png", "step-00000006.png"]
    from PIL import Image

    with Image.open(out / "snapshots" / pictures[0]) as picture:
        assert picture.size == (64, 64)  # 8 x 8 images of 8 x 8 pixels
    printed = capsys.readouterr().out
    assert "[optimizer]" in printed
    assert "images/s" in printed


def test_a_stopped_run_goes_on_bit_for_bit_past_a_damaged_file(run, caplog):
    """With dropout, whose masks come from the global generator."""
    changes = ("network.dropout=0.5", "data.flip=true")
    whole = run("whole", *changes)
    parts = run("parts", *changes, "training.steps=5")
    newest = parts / "checkpoints" / "step-00000005.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    with (parts / "log.jsonl").open("a") as file:
        file.write('\0\0\n{"st\n3\n')  # of a machine that stopped
        file.write('{"step": 6, "lo')  # killed while it wrote
    caplog.clear()
    run("parts", *changes)
    assert "step-00000005.pt" in caplog.text
    assert equal(weights(whole, 6), weights(parts, 6))
    assert losses(whole) == losses(parts)


def test_a_signal_saves_and_the_run_goes_on(run, train, monkeypatch, capsys):
    whole, add = run("whole"), train.Log.add

    def killed(self, step, *values, **options):
        add(self, step, *values, **options)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "add", killed)
        out = run("stopped")
    assert "stopped by a signal" in capsys.readouterr().out
    assert losses(out)[-1][0] == 3  # the one that it was in
    run("stopped")
    assert equal(weights(whole, 6), weights(out, 6))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_micro_batches_of_unequal_sizes_add_up(run):
    whole, parts = run("whole"), run("parts", "run.micro_batch=5")
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(whole), losses(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert norm_a == pytest.approx(norm_b, rel=1e-5)


def test_settings_of_a_run_cannot_change_but_its_length_can(run):
    run("a", "training.steps=2")
    with pytest.raises(SystemExit) as refused:
        run("a", "optimizer.lr=2e-3", "model.name=X0Model", "run.log_every=2")
    message = str(refused.value)
    assert "optimizer.lr: 0.001 in the checkpoint, 0.002 here" in message
    assert "model.name" in message
    assert "log_every" not in message
    assert losses(run("a", "training.steps=3", "run.log_every=3"))[-1][0] == 3


def test_data_that_changed_are_refused(run, tmp_path):
    run("a", "training.steps=2")
    moved = tmp_path / "moved.npz"
    (tmp_path / "squares.npz").rename(moved)
    run("a", "training.steps=3", data=moved)  # the same data elsewhere
    save_squares(moved, 119)
    with pytest.raises(SystemExit, match="data that have changed"):
        run("a", data=moved)


def test_a_full_disk_stops_with_earlier_checkpoints_whole(run, tmp_path):
    out = run("a", "training.steps=2")
    before = weights(out, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"stopped at step 4: .*step-00000004.pt"):
            run("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert equal(before, weights(out, 2))
    assert equal(weights(run("a"), 6), weights(run("whole"), 6))


def test_gradients_that_stay_infinite_stop_with_advice(run, train, monkeypatch):
    monkeypatch.setattr(train, "SKIPPED", 3)
    call = train.Losses.__call__
    monkeypatch.setattr(train.Losses, "__call__", lambda *args: call(*args) * torch.nan)
    with pytest.raises(SystemExit, match=r"stopped at step 3: .*optimizer\.lr"):
        run("a")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ((), {"preset": "tiny-glyfs"}, "tiny-glyphs"),
        (("optimizer.rate=1",), {}, "rate"),
        ((), {"data": "nowhere"}, "nowhere"),
        (("data.channels=3",), {"data": "glyphs"}, "channels: expected 1 for glyphs, got 3"),
        (("data.classes=2",), {}, r"classes: expected 3, as the data have, got 2"),
        (
            ("data.size=7",),
            {},
            r"\[network\]: expected one for images \(1, 7, 7\): x: .* divisible",
        ),
        (("training.label_dropout=0.1",), {}, r"expected 0 without \[data\] classes, got 0.1"),
        (("training.learn=dequantizer",), {}, "learn: expected model without a"),
        (("network.num_classes=3",), {}, "class_labels: expected a tensor"),
        (("augmentation=EDMAugmentation",), {}, "condition: expected None"),
        (("sampler.steps=0",), {}, "steps: expected an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(run, changes, options, message):
    with pytest.raises(SystemExit, match=message):
        run("a", *changes, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(run, tmp_path, workers):
    folder = tmp_path / "files"
    images = torch.zeros(24, 1, 8, 8, dtype=torch.uint8)
    save_images(images, folder)
    (folder / "00000007.png").write_bytes(b"none")
    with pytest.raises(
        SystemExit, match=r"^train.py: stopped at step [01]: \S*00000007.png: expec"
    ):
        run("a", f"run.workers={workers}", data=folder)


def test_samples_that_are_not_finite_cost_a_snapshot_and_nothing_else(run, train, capsys):
    """The first snapshot comes at a step that is also saved."""
    sampler, made = train.presets.sampler, []

    def infinite(*args):
        made.append(sampler(*args))
        return lambda shape, **given: made[-1](torch.full(shape, torch.inf), **given)

    train.presets.sampler = infinite
    try:
        out = run("a", "run.snapshot_every=2", "run.save_every=2", "training.steps=4")
    finally:
        train.presets.sampler = sampler
    assert weights(out, 4)
    assert "no snapshot: " in capsys.readouterr().out
    assert not (out / "snapshots").exists()


@pytest.mark.parametrize("count", [5, 24])
def test_batches_that_processes_cannot_share_are_refused(train, tmp_path, count):
    words = arguments(tmp_path, "a")
    settings = train.presets.load(words[1], [f"data.source={words[3]!r}"])
    place = train.Place(0, count, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"multiple of the {count} processes, got 12"):
        train.Training(settings, tmp_path, place)
