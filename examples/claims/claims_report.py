"""Write the tables and figures of "What the papers claim, and what we measured" from the numbers.

    python examples/claims/claims_report.py

It reads the JSON files of examples/claims/results and writes docs/tables/claims*.md and
docs/_static/claims_*.png. Takes seconds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import chains
import colorization
import controllable
import correctors_at_equal_cost
import cosine_with_mlps
import edm_sampling
import maximum_likelihood
import network_widths
import stable_targets
from experiment import Claim, Finding
from helpers import argument_parser, save
from intervals import verdict
from results import FOLDER, Results

ROOT = Path(__file__).parents[2]
CLAIMS = tuple(
    module.CLAIM
    for module in (
        stable_targets, chains, network_widths, maximum_likelihood, correctors_at_equal_cost,
        controllable, colorization, edm_sampling, cosine_with_mlps,
    )
)  # fmt: skip
VERDICTS = ("shown", "not resolved", "opposite", "not measured")


def verdict_of(finding: Finding) -> str:
    """Return the verdict of a finding, also of one without numbers."""
    return "not measured" if finding.found is None else verdict(finding.found, finding.claimed)


def table(findings: Sequence[Finding], first: str = "claim") -> Iterator[str]:
    """Yield the lines of a table of findings, with the heading of its first column."""
    yield f"| {first} | measured | means | difference | seeds, steps | verdict |"
    yield "|---|---|---|---|---|---|"
    for finding in findings:
        found, digits = finding.found, finding.digits
        means = difference = budget = ""
        if found is not None:
            (a, x), (b, y) = finding.a, finding.b
            means = f"{a} {x:.{digits}f}, {b} {y:.{digits}f}"
            difference = f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}"
            budget = f"{found.count}, {finding.steps:,}"
        cells = (finding.claim, finding.measure, means, difference, budget, verdict_of(finding))
        yield f"| {' | '.join(cells)} |"


def overview(numbers: dict[str, Results]) -> Iterator[str]:
    """Yield the lines of the table of all claims: verdicts, cost and commands; last, the sums."""
    total, hours = Counter[str](), 0.0
    yield f"| claims | paper | {' | '.join(VERDICTS)} | core hours | command |"
    yield "|---" * (4 + len(VERDICTS)) + "|"
    for claim in CLAIMS:
        results = numbers[claim.name]
        counts = Counter(map(verdict_of, claim.findings(results)))
        total, hours = total + counts, hours + results.hours()
        papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in claim.papers)
        cells = [f"[{claim.title}](#{anchor(claim)})", papers,
                 *(str(counts[name]) for name in VERDICTS), f"{results.hours():.1f}",
                 f"`python examples/claims/{claim.name}.py`"]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    sums = " | ".join(f"**{total[name]}**" for name in VERDICTS)
    yield f"| **all** | | {sums} | **{hours:.1f}** | |"


def anchor(claim: Claim) -> str:
    """Return the anchor of a claim's heading."""
    return claim.title.lower().replace(" ", "-")


def tables(numbers: dict[str, Results]) -> dict[str, str]:
    """Return the text of every table, by the name of its file."""
    found = {"claims": overview(numbers)}
    found["claims_variances"] = stable_targets.variance_table(numbers["stable_targets"])
    found["claims_gains"] = stable_targets.gain_table(numbers["stable_targets"])
    found["claims_floor"] = correctors_at_equal_cost.floor(numbers["correctors_at_equal_cost"])
    found["claims_crossings"] = maximum_likelihood.crossings(numbers["maximum_likelihood"])
    for claim in CLAIMS:
        results = numbers[claim.name]
        found[f"claims_{claim.name}"] = table(claim.findings(results))
        if claim.others:
            found[f"claims_{claim.name}_others"] = table(claim.others(results), "check")
    return {name: "\n".join(lines) + "\n" for name, lines in found.items()}


def kept_numbers(folder: Path = FOLDER) -> dict[str, Results]:
    """Return the numbers of all claims in a folder, at the small scale."""
    return {claim.name: Results(claim.path(folder, "small")) for claim in CLAIMS}


def main(argv: Sequence[str] | None = None) -> None:
    """Write all tables and figures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--results", type=Path, default=FOLDER, help="the folder of the numbers")
    add("--docs", type=Path, default=ROOT / "docs", help="the folder of the documentation")
    options = parser.parse_args(argv)
    numbers = kept_numbers(options.results)
    for name, text in tables(numbers).items():
        path = options.docs / "tables" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for claim in CLAIMS:
        figure = claim.draw(numbers[claim.name])
        save(figure, options.docs / "_static" / f"claims_{claim.name}.png")


if __name__ == "__main__":
    main()
