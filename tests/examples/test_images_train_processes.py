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
@pytest.mark.parametrize(
    "changes",
    [
        ("objective.target={name='StableTarget'}", "training.reference_size=36"),
        (
            "augmentation={name='EDMAugmentation',probability=0.5}",
            "network.condition_features=9",
        ),
        ("run.compile=true", "run.activation_checkpointing=true"),
        ("average={name='PowerEMA',sigma_rels=[0.05,0.1]}",),
        (
            "dequantization={name='VariationalDequantizer',steps=1,width=8,components=2,"
            "context_width=4,blocks=1,heads=1}",
            "training.learn='dequantizer'",
            "process={name='VPSDE',t_min=1e-5}",
            "model={name='EpsModel'}",
            "objective.weighting='LikelihoodWeighting'",
            "objective.times={name='ImportanceTimes',stratified=false}",
            "sampler.grid={name='UniformGrid'}",
            "sampler.predictor='DDIM'",
        ),
    ],
    ids=["stable-target", "augmentation", "compiled", "power-average", "dequantizer"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from the compiler
def test_every_part_learns_the_same_in_two_processes(changes, tmp_path, monkeypatch):
    """Losses of ten steps are those of one process, to 1e-5."""
    pytest.importorskip("PIL")
    fixed = ("training.steps=10", "run.save_every=10", *changes)
    runs = [arguments(tmp_path, "two", *fixed)]
    program = TRAIN.format(path=[str(PROGRAM.parent)], runs=json.dumps(runs))
    assert run_in_two_processes(program, tmp_path) == [[], []]
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import train

    train.main(arguments(tmp_path, "one", *fixed))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", [["kill_ranks.py", "--kills", "2"], ["two_hosts.py"]])
def test_scripts_find_the_same_weights(script):
    """Ranks that are killed, and two network namespaces as two hosts."""
    pytest.importorskip("PIL")
    path = PROGRAM.parents[2] / "tests" / "scripts" / script[0]
    done = subprocess.run([sys.executable, path, *script[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
