"""Run our code, peers and the bare arithmetic in turns, and keep the rows of the docs page "Speed".

A benchmark makes cases and hands them to `report`, which prints one row for each and, with a path,
saves them as a table of docs/tables. Peers are optional: a case names those that are installed.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Run = Callable[[], object]

TABLES = Path(__file__).resolve().parent.parent / "docs" / "tables"


@dataclass(frozen=True)
class Case:
    """One row: the same work by several programs.

    Args:
        work: what is done, with its shape.
        ours: a run of our code.
        bare: a run of the tensor operations that such work cannot do without.
        peers: runs of other libraries, by name.
        per: the number of units in a run, such as the steps of a sampler.
    """

    work: str
    ours: Run
    bare: Run | None = None
    peers: dict[str, Run] = field(default_factory=dict)
    per: int = 1


@dataclass(frozen=True)
class Row:
    """The medians of a case: microseconds per unit, and ratios to ours, paired by round."""

    work: str
    ours: float
    bare_ratio: float | None
    peer: str
    peer_ratio: float | None


def options(description: str) -> argparse.ArgumentParser:
    """Return the parser with the options that every benchmark of this kind has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds over which medians are taken"
    )
    parser.add_argument("--moments", type=int, default=1, help="how often all rows are measured")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="the device of all tensors")
    parser.add_argument("--save", action="store_true", help="save the table for the docs")
    return parser


def microseconds(run: Run, per: int, device: torch.device) -> float:
    """Return the time of one run, in microseconds per unit.

    On one thread of the CPU it is the time of this process, in which other programs have no part.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / per * 1e6


def repeated(run: Run, calls: int) -> Run:
    """Return several calls as one run."""

    def all_of_them() -> None:
        for _ in range(calls):
            run()

    return all_of_them


def measure(case: Case, rounds: int, device: torch.device) -> Row:
    """Return the row of a case, its runs alternating within every round."""
    runs = {"ours": case.ours, **case.peers}
    if case.bare is not None:
        runs["bare arithmetic"] = case.bare
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            passed = microseconds(run, case.per, device)
            if round_ >= 2:  # after two warm-up rounds
                times[name].append(passed)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, times["ours"], strict=True))
        for name, values in times.items()
    }
    bare_ratio = ratios.pop("bare arithmetic", None)
    del ratios["ours"]
    peer = min(ratios, key=ratios.__getitem__, default="")
    return Row(
        work=case.work,
        ours=statistics.median(times["ours"]),
        bare_ratio=bare_ratio,
        peer=peer,
        peer_ratio=ratios.get(peer),
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown; a ratio above one means that ours is faster."""
    lines = ["| work | ours | fastest peer | peer / ours | bare / ours |", "|---|---|---|---|---|"]
    for row in rows:
        peer = "" if row.peer_ratio is None else f"{row.peer_ratio:.2f}"
        bare = "" if row.bare_ratio is None else f"{row.bare_ratio:.2f}"
        ours = f"{row.ours:.0f} µs" if row.ours < 1e4 else f"{row.ours / 1e3:.0f} ms"
        lines.append(f"| {row.work} | {ours} | {row.peer} | {peer} | {bare} |")
    return "\n".join(lines)


def middle(rows: Sequence[Row]) -> Row:
    """Return the medians of a row that was measured at several moments."""
    first = rows[0]
    bare, peers = ([getattr(r, name) for r in rows] for name in ("bare_ratio", "peer_ratio"))
    return Row(
        work=first.work,
        ours=statistics.median(row.ours for row in rows),
        bare_ratio=None if None in bare else statistics.median(bare),
        peer=min(rows, key=lambda row: row.peer_ratio or math.inf).peer,
        peer_ratio=None if None in peers else statistics.median(peers),
    )


def show(name: str, rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Print the table of a script and, if requested, save it as `speed_<name>.md`."""
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = "one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    counts = f"{arguments.rounds} rounds"
    if arguments.moments > 1:
        counts += f" at each of {arguments.moments} moments"
    text = (
        f"`python benchmarks/{name}.py`: {where}, {threads}, "
        f"torch {torch.__version__.partition('+')[0]}, {datetime.date.today()}; medians of "
        f"{counts}.\n\n{table(rows)}\n"
    )
    print(text)
    if arguments.save:
        (TABLES / f"speed_{name}.md").write_text(text, encoding="utf-8")


def report(name: str, cases: Sequence[Case], arguments: argparse.Namespace) -> list[Row]:
    """Measure all cases and show their table."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    moments = [
        [measure(case, arguments.rounds, device) for case in cases]
        for _ in range(arguments.moments)
    ]
    rows = [middle(found) for found in zip(*moments, strict=True)]
    show(name, rows, arguments)
    return rows
