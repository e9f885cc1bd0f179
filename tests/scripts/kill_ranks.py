"""Kill a rank of train.py at random times under torchrun, and compare with the uninterrupted run.

    python tests/scripts/kill_ranks.py --kills 20

Each run of two processes, with dropout, is killed once with SIGKILL: one rank, at a random time
within a random step. With `--max-restarts 1` it must end with the weights, averages, moments and
losses of the uninterrupted run, bit for bit. Then runs are killed for good and go on with another
number of processes: their random states must be distinct, and without dropout the weights those
of one process to 1e-5.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples/images")]
import train  # noqa: E402 - before processes are forked
from support.image_runs import arguments, distance, equal, weights  # noqa: E402

STEPS = 8


def work(words: list[str], kill_at: tuple[int, int, float], marker: Path) -> None:
    """Run train.py in this process, which dies once, at a step of a rank after a delay."""
    rank, step, delay = kill_at
    backward, last = train.Training.backward, train.Training.train

    def kill() -> None:
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(self: train.Training, batch: Any) -> torch.Tensor:
        if (self.place.rank, self.step) == (rank, step) and not marker.exists():
            if delay == 0:
                kill()
            threading.Timer(delay, kill).start()
        return backward(self, batch)

    def trained(self: train.Training) -> None:
        last(self)
        state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        (self.out / f"random-{self.place.rank}").write_text(state)

    train.Training.backward, train.Training.train = dying, trained
    train.main(words)


def launch(
    words: list[str], processes: int, kill_at: tuple[int, int, float], restarts: int, marker: Path
) -> bool:
    """Run train.py with torchrun's agent, on forked processes; return whether it ended well."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=restarts,
        run_id=marker.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
        monitor_interval=0.05,
        logs_specs=DefaultLogsSpecs(log_dir=f"{marker}-logs", redirects=Std.ALL),
    )  # fmt: skip
    os.makedirs(f"{marker}-logs", exist_ok=True)
    try:
        elastic_launch(config, work)(words, kill_at, marker)
    except ChildFailedError:
        return False
    return True


def log(out: Path) -> list[tuple[int, float, float]]:
    """Return steps, losses and gradient norms."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient"]) for line in lines]


def main(kills: int, resized: int, seed: int, folder: Path) -> bool:
    """Compare all runs; return whether all were right."""
    never, rng, right = (-1, 0, 0.0), random.Random(seed), True
    changes = (f"training.steps={STEPS}", "network.dropout=0.3")
    if not launch(arguments(folder, "whole", *changes), 2, never, 0, folder / "whole-marker"):
        raise SystemExit("the uninterrupted run failed")
    expected, losses = weights(folder / "whole", STEPS), log(folder / "whole")
    same = 0
    for number in range(kills):
        # The delay reaches into the write of a checkpoint and the steps after.
        at = (rng.randrange(2), rng.randrange(STEPS), rng.choice([0, rng.uniform(0, 0.5)]))
        name, marker = f"killed-{number}", folder / f"killed-{number}-marker"
        ended = launch(arguments(folder, name, *changes), 2, at, 1, marker)
        out = folder / name
        ended = ended and log(out) == losses and equal(expected, weights(out, STEPS))
        same += ended
        happened = "killed" if marker.exists() else "ended before the kill"
        print(f"kill {number + 1}: rank {at[0]}, step {at[1]}, after {at[2]:.2f} s: {happened}, "
              f"{'the same bits' if ended else 'DIFFERENT'}", flush=True)  # fmt: skip
        right &= ended
    if kills:
        print(f"{same} of {kills} runs with one kill ended with the same bits", flush=True)
    if resized:
        plain = (f"training.steps={STEPS}",)
        launch(arguments(folder, "one", *plain), 1, never, 0, folder / "one-marker")
        expected = weights(folder / "one", STEPS)
    for number, processes in zip(range(resized), [1, 3] * resized, strict=False):
        for dropout in ("", "network.dropout=0.3"):
            kind = f"{number}{'-dropout' if dropout else ''}"
            name, marker = f"resized-{kind}", folder / f"resized-{kind}-marker"
            changed = (f"training.steps={STEPS}", *([dropout] if dropout else []))
            words = arguments(folder, name, *changed)
            killed = not launch(
                words, 2, (rng.randrange(2), rng.randrange(3, STEPS), 0.0), 0, marker
            )
            ended = launch(words, processes, never, 0, folder / f"{kind}-after-marker")
            out = folder / name
            states = {(out / f"random-{rank}").read_text() for rank in range(processes)}
            fine = killed and ended and len(states) == processes
            far = distance(expected, weights(out, STEPS)) if not dropout else None
            fine &= far is None or far < 1e-5
            right &= fine
            print(f"2 -> {processes} processes, dropout {dropout[-3:] or 0}: "
                  f"{len(states)} distinct random states, difference from one process "
                  f"{'-' if far is None else f'{far:.1e}'}", flush=True)  # fmt: skip
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--resized", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        right = main(options.kills, options.resized, options.seed, Path(name))
    sys.exit(not right)
