"""train.py in two processes: what one process with the same batch learns."""

import json
import subprocess
import sys

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
import contextlib
import gc
import json
import sys

sys.path[:0] = {path!r}
import train
from torch.nn.parallel import DistributedDataParallel

alive = []

@contextlib.contextmanager
def launched():
    with join() as place:
        yield place
    gc.collect()
    alive.extend(type(o) for o in gc.get_objects() if type(o) is DistributedDataParallel)

join, train.launched = train.launched, launched
for words in json.loads({runs!r}):
    train.main(words)
result = alive
"""


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "names", [["ddp"], pytest.param(["fsdp", "accumulated"], marks=pytest.mark.slow)]
)
def test_two_processes_learn_what_one_does(names, tmp_path, monkeypatch):
    """Losses and weights are the same to 1e-5 after 20 steps, however the work is shared out."""
    pytest.importorskip("PIL")
    fixed = (STEPS, "run.save_every=20", "data.classes=3", "training.label_dropout=0.2")
    runs = [arguments(tmp_path, name, *fixed, *CHANGES[name]) for name in names]
    program = TRAIN.format(path=[str(PROGRAM.parent)], runs=json.dumps(runs))
    # A DDP module that outlives its group may hang when it is freed.
    assert run_in_two_processes(program, tmp_path) == [[], []]
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import train

    train.main(arguments(tmp_path, "one", *fixed))
    expected = weights(tmp_path / "one", 20)
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert distance(expected, weights(tmp_path / name, 20)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("script", [["kill_ranks.py", "--kills", "2"], ["two_hosts.py"]])
def test_scripts_find_the_same_weights(script):
    """Ranks that are killed, and two network namespaces as two hosts."""
    pytest.importorskip("PIL")
    path = PROGRAM.parents[2] / "tests" / "scripts" / script[0]
    done = subprocess.run([sys.executable, path, *script[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
