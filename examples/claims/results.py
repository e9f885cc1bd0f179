"""The numbers of claims, in small JSON files: read, written, compared and merged.

    python examples/claims/results.py compare outputs/claims/chains.json \
        examples/claims/results/chains.json
    python examples/claims/results.py merge outputs/claims/*.json --into examples/claims/results

A file has numbers by run, seed, number of training steps and measure, and the seconds that each
took. `compare` says which numbers differ and by what share of the larger, and ends with status 1 if
any do. `merge` adds those that are missing, and refuses to change one.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"  # those of the documentation


class Results:
    """The numbers of a claim.

    Args:
        path: the JSON file; need not exist.
        settings: what all numbers have in common, such as the scale; a file with others is refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.settings: dict[str, Any] = stored.get("settings", settings or {})
        if settings is not None and self.settings != settings:
            raise ValueError(f"{path}: expected numbers at {settings}, got some at {self.settings}")
        self.numbers: dict[str, dict[str, Any]] = stored.get("numbers", {})
        self.seconds: dict[str, dict[str, float]] = stored.get("seconds", {})

    @staticmethod
    def key(run: str, seed: int, steps: int) -> str:
        """Return the key of a run at a number of training steps."""
        return f"{run}, seed {seed}, {steps} steps"

    def get(self, key: str, measure: str) -> Any:
        """Return a number or a table of them, None if it has not been measured."""
        return self.numbers.get(key, {}).get(measure)

    def add(
        self, key: str, measure: str, value: Any, seconds: float, training: float = 0.0
    ) -> None:
        """Add a number, the seconds that it took and those of training before; write the file."""
        # As it will be read: keys are strings, tuples lists.
        self.numbers.setdefault(key, {})[measure] = json.loads(json.dumps(value))
        costs = self.seconds.setdefault(key, {})
        costs[measure] = round(seconds, 1)
        if training:
            costs["training"] = round(training, 1)
        self.write()

    def seeds(self, run: str, steps: int, measure: str) -> dict[int, Any]:
        """Return a measure of a run at a number of training steps, by seed."""
        found = {}
        for key, measures in self.numbers.items():
            name, seed, at = key.rsplit(", ", 2)
            if name == run and at == f"{steps} steps" and measure in measures:
                found[int(seed.removeprefix("seed "))] = measures[measure]
        return dict(sorted(found.items()))

    def steps(self, run: str, measure: str) -> list[int]:
        """Return the numbers of training steps at which a run was measured, in order."""
        found = set()
        for key, measures in self.numbers.items():
            name, _, at = key.rsplit(", ", 2)
            if name == run and measure in measures:
                found.add(int(at.removesuffix(" steps")))
        return sorted(found)

    def common_steps(self, *measured: tuple[str, str]) -> list[int]:
        """Return the numbers of training steps at which all pairs of a run and a measure are."""
        return sorted(set.intersection(*(set(self.steps(*pair)) for pair in measured)))

    def hours(self) -> float:
        """Return the hours of all measures and of training, that of a run counted once."""
        training: dict[str, float] = {}
        total = 0.0
        for key, costs in self.seconds.items():
            run = key.rpartition(",")[0]
            training[run] = max(training.get(run, 0.0), costs.get("training", 0.0))
            total += sum(value for measure, value in costs.items() if measure != "training")
        return (total + sum(training.values())) / 3600

    def write(self) -> None:
        """Write the file, in the order of its keys, so that equal numbers are equal files."""
        content = {
            "settings": self.settings,
            "numbers": _ordered(self.numbers),
            "seconds": _ordered(self.seconds),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".partial-{os.getpid()}-{self.path.name}")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.path)


def _ordered(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: dict(sorted(measures.items())) for key, measures in sorted(table.items())}


def differences(a: Results, b: Results) -> list[str]:
    """Return a line for each number, or table of them, that both have, but not alike."""
    return [
        f"{key}, {measure}: {value} and {other}, differ by {change(value, other):.2g}"
        for key, measures in a.numbers.items()
        for measure, value in measures.items()
        if (other := b.get(key, measure)) not in (None, value)
    ]


def change(a: Any, b: Any) -> float:
    """Return the largest difference within two tables of numbers, as a share of the larger.

    It is infinite if they do not have the same entries.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((change(value, b[name]) for name, value in a.items()), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max((change(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if a == b:
        return 0.0
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return abs(a - b) / max(abs(a), abs(b)) if numbers else math.inf


def merge(source: Results, target: Results) -> int:
    """Add the numbers that the target does not have, and return how many; raise if any differ."""
    if target.numbers and source.settings != target.settings:
        raise ValueError(f"{source.path}: expected numbers at {target.settings}, "
                         f"got some at {source.settings}")  # fmt: skip
    if lines := differences(source, target):
        raise ValueError(f"{source.path}: expected the numbers of {target.path}, got others:\n"
                         + "\n".join(lines))  # fmt: skip
    target.settings, count = source.settings, 0
    for key, measures in source.numbers.items():
        for measure, value in measures.items():
            if target.get(key, measure) is None:
                costs = source.seconds[key]
                target.add(key, measure, value, costs[measure], costs.get("training", 0.0))
                count += 1
    return count


def main(arguments: list[str] | None = None) -> None:
    """Compare two files, or merge some into those of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("compare", help="compare two files")
    one.add_argument("files", type=Path, nargs=2)
    two = commands.add_parser("merge", help="add numbers to the files of a folder")
    two.add_argument("files", type=Path, nargs="+")
    two.add_argument("--into", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    try:
        if options.command == "compare":
            first, second = (Results(path) for path in options.files)
            both = sum(second.get(key, m) is not None for key in first.numbers
                       for m in first.numbers[key])  # fmt: skip
            lines = differences(first, second)
            print("\n".join(lines) or f"{both} numbers are equal")
            if lines:
                raise SystemExit(1)
        else:
            for path in options.files:
                count = merge(Results(path), Results(options.into / path.name))
                print(f"{path.name}: {count} numbers added")
    except ValueError as error:
        raise SystemExit(f"results.py: {error}") from error


if __name__ == "__main__":
    main()
