"""train.py in two processes: what one process with the same batch learns."""

import json

import pytest
from support.image_runs import PROGRAM, arguments, distance, weights
from support.processes import run_in_two_processes

STEPS = "training.steps=20"
CHANGES = {
    "ddp": ("run.micro_batch=4",),
    "fsdp": ("run.shard=true",),
    "accumulated": ("run.shard=true", "run.micro_batch=4"),
}
TRAIN = """
import json
import sys

sys.path[:0] = {path!r}
import train

for words in json.loads({runs!r}):
    train.main(words)
result = None
"""


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    """Losses and weights are the same to 1e-5 after 20 steps, however the work is shared out."""
    pytest.importorskip("PIL")
    fixed = (STEPS, "run.save_every=20", "data.classes=3", "training.label_dropout=0.2")
    runs = [arguments(tmp_path, name, *fixed, *more) for name, more in CHANGES.items()]
    program = TRAIN.format(path=[str(PROGRAM.parent)], runs=json.dumps(runs))
    run_in_two_processes(program, tmp_path)
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import train

    train.main(arguments(tmp_path, "one", *fixed))
    expected = weights(tmp_path / "one", 20)
    for name in CHANGES:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), name
        assert distance(expected, weights(tmp_path / name, 20)) < 1e-5, name
