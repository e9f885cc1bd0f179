"""Short runs of the whole library whose numbers a refactoring must not change.

A refactoring moves and renames code; it computes what the code computed before. So it owes the
same bits before and after, in every loss, gradient, sample, likelihood, network, checkpoint and
metric. Each run here is a small function with fixed seeds that returns tensors, and `values.json`
holds what the code returned when they were last recorded: of every tensor its shape, its dtype,
the SHA-256 of its bytes, a few of its entries, their sum and their largest magnitude.

`test_refactoring.py` compares. On the kind of machine the values were recorded on (the same
versions of PyTorch, NumPy and torchdiffeq, the same processor) every bit must agree. Elsewhere,
where sums are taken in another order, the entries must agree closely.

    python tests/refactoring/runs.py --compare            # identical, close or different, by run
    python tests/refactoring/runs.py --compare grids bits # of these runs alone
    python tests/refactoring/runs.py --record             # write values.json anew

A rename changes the runs, in what they call, and not the values. Recording again is right after
an intended change of numbers, one that CHANGELOG.md names, and for new runs; never to make a
refactoring pass. `--record` with the names of runs leaves the values of the others as they are,
and works only on a machine of the recorded kind; without names it records all of them.
"""

import argparse
import hashlib
import inspect
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import likelihood_runs
import loss_runs
import network_runs
import numpy as np
import sample_runs
import torch

VALUES = Path(__file__).with_name("values.json")
RUNS = {
    name: function
    for module in (loss_runs, sample_runs, likelihood_runs, network_runs)
    for name, function in vars(module).items()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and not name.startswith("_")
}
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}  # relative, and 1e-4 for all others


def fingerprint():
    """Return what the bits depend on beside the code."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchdiffeq": version("torchdiffeq"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "processor": _processor(),
    }


def _processor():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run(name):
    """Return the record of every tensor of a run, made on one thread from a seed of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = dict(_tensors(RUNS[name]()))
    finally:
        torch.set_num_threads(threads)
    return {key: _record(x) for key, x in found.items()}


def _tensors(found, key=""):
    """Yield every tensor of nested results, with the path to it."""
    if isinstance(found, dict):
        parts = found.items()
    elif isinstance(found, (list, tuple)):
        parts = enumerate(found)
    else:
        dtype = torch.float64 if isinstance(found, float) else None
        yield key, torch.as_tensor(found, dtype=dtype)
        return
    for name, part in parts:
        yield from _tensors(part, f"{key} / {name}" if key else str(name))


def _record(x):
    x = x.detach().cpu().contiguous()
    data = x.reshape(-1).view(torch.uint8).numpy().tobytes()
    whole = not x.dtype.is_floating_point
    numbers = x.reshape(-1).tolist() if whole else x.reshape(-1).double().tolist()
    digits = 17 if x.dtype == torch.float64 else 9  # all there are
    ends = [*numbers[:4], *numbers[4:][-2:]]
    kept = [*ends, math.fsum(numbers), max(map(abs, numbers), default=0)]
    return [
        str(x.dtype).removeprefix("torch."),
        list(x.shape),
        hashlib.sha256(data).hexdigest(),
        [int(v) if whole else float(f"{v:.{digits}g}") for v in kept],
    ]


def compare(expected, found):
    """Say how two records of a run compare: identical, close or different, and where."""
    if list(expected) != list(found):
        return "different", [f"expected {list(expected)}, got {list(found)}"]
    changed = [key for key in expected if expected[key][:3] != found[key][:3]]
    apart = [key for key in changed if not _close(expected[key], found[key])]
    if apart:
        return "different", [f"{k}: expected {expected[k]}, got {found[k]}" for k in apart]
    return ("close" if changed else "identical"), changed


def _close(a, b):
    kind, shape, digest, (*entries, total, size) = a
    other_kind, other_shape, other_digest, (*others, other_total, other_size) = b
    if (shape, kind) != (other_shape, other_kind):
        return False
    dtype = getattr(torch, kind)
    if not dtype.is_floating_point:
        return digest == other_digest
    rtol, count = TOLERANCE.get(dtype, 1e-4), math.prod(shape)
    pairs = [*zip(entries, others, strict=True), (size, other_size)]
    return _near(total, other_total, rtol * size * math.sqrt(count)) and all(
        _near(u, v, rtol * abs(u) + 0.1 * rtol * size) for u, v in pairs
    )


def _near(u, v, slack):
    return u == v or (math.isnan(u) and math.isnan(v)) or abs(u - v) <= slack


def recorded():
    """Return the fingerprint and the records of `values.json`."""
    content = json.loads(VALUES.read_text())
    return content["fingerprint"], content["runs"]


def _write(runs):
    """Write records, one tensor a line."""
    blocks = []
    for name in RUNS:
        rows = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in runs[name].items()]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}")
    head, body = json.dumps(fingerprint(), indent=1), ",\n".join(blocks)
    VALUES.write_text(f'{{\n"fingerprint": {head},\n"runs": {{\n{body}\n}}\n}}\n')


def _say(line):
    sys.stdout.write(line + "\n")


def _compare_all(names):
    machine, expected = recorded()
    same = machine == fingerprint()
    if not same:
        _say(f"recorded with {machine}\nrunning with  {fingerprint()}")
    counts = {"identical": 0, "close": 0, "different": 0}
    for name in names:
        began = time.perf_counter()
        verdict, where = compare(expected.get(name, {}), run(name))
        counts[verdict] += 1
        _say(f"{verdict:10} {name} ({time.perf_counter() - began:.2f} s)")
        for line in where:
            _say(f"    {line}")
    _say(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return int(counts["different"] > 0 or (same and counts["close"] > 0))


def _record_all(names, chosen):
    runs = {}
    if chosen:
        machine, runs = recorded()
        if machine != fingerprint():
            _say("expected the kind of machine that values.json names; record all runs instead")
            return 1
    runs |= {name: run(name) for name in names}
    _write(runs)
    _say(f"recorded {len(names)} runs")
    return 0


def main():
    """Compare or record from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--compare", action="store_true", help="compare with values.json")
    action.add_argument("--record", action="store_true", help="write values.json")
    parser.add_argument("names", nargs="*", metavar="name", help="runs, all by default")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in RUNS]:
        parser.error(f"expected runs of {list(RUNS)}, got {unknown}")
    names = arguments.names or list(RUNS)
    if arguments.compare:
        return _compare_all(names)
    return _record_all(names, bool(arguments.names))


if __name__ == "__main__":
    sys.exit(main())
