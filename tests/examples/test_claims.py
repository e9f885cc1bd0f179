"""The claims of the papers: intervals, verdicts, numbers that resume, and what the page shows."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ("network.width=4", "network.multipliers=[1]", "network.attention_levels=[]",
        "training.batch=4", "sampler.steps=2")  # fmt: skip


@pytest.fixture
def intervals(claims):
    return claims("intervals")


@pytest.fixture
def results(claims):
    return claims("results")


@pytest.fixture
def lab(claims, tmp_path, monkeypatch):
    """A lab with a recipe of the name "tiny", in folders of the given name."""
    experiment, recipes = claims("experiment"), claims("recipes")
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipes.Recipe("edm", "glyphs", TINY))

    def make(folder, only=()):
        numbers = claims("results").Results(tmp_path / folder / "numbers.json", {"scale": "small"})
        return experiment.Lab(numbers, tmp_path / folder / "runs", "small", only=only)

    return make


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 20])
def test_intervals_have_the_quantiles_of_student(intervals, freedom):
    """The density of Student's t, integrated between the ends, is 95%."""
    half = intervals._STUDENT[freedom - 1]
    t = torch.linspace(-half, half, 200_001, dtype=torch.float64)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    norm = math.exp(log_norm) / math.sqrt(freedom * math.pi)
    assert float(torch.trapezoid(density, t)) * norm == pytest.approx(0.95, abs=1e-4)


def test_an_interval_of_three_values(intervals):
    found = intervals.interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3))
    assert found.low == pytest.approx(2 - found.half)
    assert intervals.interval([1.0]).half == math.inf
    tie = intervals.interval([2 / 128, 2 / 128])  # of counts
    assert (tie.mean, tie.half, tie.count) == (2 / 128, math.inf, 2)
    assert intervals.interval(range(30)).half == pytest.approx(3.287, abs=2e-2)
    with pytest.raises(ValueError, match="expected at least one"):
        intervals.interval([])


def test_differences_are_of_equal_seeds(intervals):
    """Large spreads that seeds share cancel; a seed of one run alone does not count."""
    found = intervals.difference({0: 10.0, 1: 20.5, 2: 29.5, 5: 0.0}, {0: 9.0, 1: 19.0, 2: 29.0})
    assert (found.mean, found.count) == (1, 3)
    assert found.half == pytest.approx(4.303 * 0.5 / math.sqrt(3))


def test_verdicts(intervals):
    def verdict(mean, half, claimed):
        return intervals.verdict(intervals.Interval(mean, half, 3), claimed)

    assert verdict(-2, 1, -1) == verdict(2, 1, 1) == "shown"
    assert verdict(2, 1, -1) == verdict(-2, 1, 1) == "opposite"
    assert verdict(0.5, 1, 1) == verdict(-0.5, 1, 1) == verdict(1, math.inf, 1) == "not resolved"
    assert verdict(0, 0, 1) == "not resolved"
    with pytest.raises(ValueError, match="expected 1 or -1"):
        verdict(0, 1, 0)


def test_numbers_are_kept_in_one_order(results, tmp_path):
    """Equal numbers are equal files, in whatever order they were measured."""
    files = [tmp_path / name for name in ("a.json", "b.json")]
    entries = [
        ("VP, seed 1, 10 steps", "bits", 1.5),
        ("VP, seed 0, 10 steps", "bits", [1, 2]),
        ("VP, seed 0, 10 steps", "a", {"x": 0.25}),
        ("VP, seed 0, 20 steps", "a", 0),
    ]
    for file, order in zip(files, (entries, entries[::-1]), strict=True):
        numbers = results.Results(file, {"scale": "small"})
        for entry in order:
            numbers.add(*entry, seconds=1.0, training=3.0)
    assert files[0].read_bytes() == files[1].read_bytes()
    numbers = results.Results(files[0], {"scale": "small"})
    assert numbers.seeds("VP", 10, "bits") == {0: [1, 2], 1: 1.5}
    assert numbers.steps("VP", "bits") == [10]
    assert numbers.steps("V", "bits") == []
    assert numbers.hours() == pytest.approx((4 + 2 * 3) / 3600)  # runs are trained once
    with pytest.raises(ValueError, match="expected numbers at"):
        results.Results(files[0], {"scale": "full"})


def test_numbers_are_compared_and_merged(results, tmp_path, capsys):
    a, b = (results.Results(tmp_path / f / "n.json", {"scale": "small"}) for f in "ab")
    a.add("VP, seed 0, 10 steps", "bits", 1.5, 1.0)
    b.add("VP, seed 0, 10 steps", "bits", 1.5, 9.0)
    b.add("VP, seed 1, 10 steps", "bits", 2.5, 1.0)
    results.main(["compare", str(a.path), str(b.path)])
    assert "1 numbers are equal" in capsys.readouterr().out
    results.main(["merge", str(b.path), "--into", str(tmp_path / "a")])
    assert "1 numbers added" in capsys.readouterr().out
    merged = results.Results(a.path)
    assert merged.seeds("VP", 10, "bits") == {0: 1.5, 1: 2.5}
    assert merged.seconds["VP, seed 0, 10 steps"] == {"bits": 1.0}
    b.add("VP, seed 1, 10 steps", "bits", 2.75, 1.0)
    with pytest.raises(SystemExit, match="1"):
        results.main(["compare", str(a.path), str(b.path)])
    assert "2.5 and 2.75, differ by 0.091" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="got others"):
        results.main(["merge", str(b.path), "--into", str(tmp_path / "a")])
    assert json.loads(a.path.read_text())["numbers"]["VP, seed 1, 10 steps"] == {"bits": 2.5}


def test_differences_of_tables_are_those_of_their_numbers(results):
    """The largest share of the larger; tables of other entries are not compared."""
    change = results.change
    assert change({"a": [1.0, -2.0], "b": 3}, {"a": [1.0, -1.5], "b": 3}) == 0.25
    assert change(0.0, 0.5) == change(-0.5, 0.0) == 1.0
    assert change({}, {}) == change([], []) == change("x", "x") == 0.0
    assert change({"a": 1.0}, {"b": 1.0}) == change([1.0], [1.0, 2.0]) == math.inf
    assert change(1.0, [1.0]) == change("x", 1.0) == math.inf


def test_a_run_in_pieces_has_the_numbers_of_one_in_a_piece(lab, claims):
    """Resumed after two steps, from its checkpoint and in another object: the same bits."""
    measures = claims("measures")

    def error(run):
        return measures.loss_by_noise(run, [0.5, 2.0], 8)

    whole, first = lab("whole"), lab("pieces")
    expected = whole.measure("tiny", 3, 4, "error", error)
    first.measure("tiny", 3, 2, "error", error)
    second = lab("pieces")
    assert second.measure("tiny", 3, 4, "error", error) == expected
    assert second.measure("tiny", 3, 2, "error", error) != expected
    key = "tiny, seed 3, 4 steps"
    assert second.results.numbers[key] == whole.results.numbers[key]
    assert second.results.seconds[key]["training"] > 0

    def never(run):
        raise AssertionError("measured again")

    assert lab("pieces").measure("tiny", 3, 4, "error", never) == expected
    assert lab("pieces", only=("VP",)).measure("tiny", 3, 4, "other", never) is None
    # Fewer steps than the run has taken by now: a run of its own, the same as a new one.
    assert second.measure("tiny", 3, 3, "error", error) == lab("new").measure(
        "tiny", 3, 3, "error", error
    )
    assert lab("pieces").measure("tiny", 3, 4, "error", never) == expected


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_errors_by_noise_are_those_of_the_data(lab, claims, monkeypatch, low):
    """A network of zeros: EDM's model then returns c x; the error is that of data in [-1, 1]."""
    recipes, measures = claims("recipes"), claims("measures")
    changes = (*TINY, f"data.range=[{low}, 1.0]")
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipes.Recipe("edm", "glyphs", changes))
    run = lab("zero").run("tiny", 0, 1)
    for parameter in run.parts.network.parameters():
        torch.nn.init.zeros_(parameter)
    for parameter in run.model.parameters():
        torch.nn.init.zeros_(parameter)
    unit, noise = (1 - low) / 2, 0.7
    found = measures.loss_by_noise(run, [noise], 256)
    second = float(measures.scaled(run, measures.test_images(run, 256)).square().mean())
    c = 0.25 / (0.25 + (noise * unit) ** 2)
    expected = (1 - c) ** 2 * second / unit**2 + (c * noise) ** 2
    assert found["0.7"] == pytest.approx(expected, rel=0.01)


def test_bits_above_a_log_snr(claims):
    """Shares of a step are even in the log-SNR; beyond the ends is nothing, or all."""
    measures = claims("measures")
    log_snr = torch.tensor([9.0, 5.0, 1.0], dtype=torch.float64)
    above = torch.tensor([2.0, 3.0, 7.0], dtype=torch.float64)
    edges = (10.0, 9.0, 8.0, 5.0, 3.0, 1.0, -5.0)
    assert [measures._at(edge, log_snr, above) for edge in edges] == [2, 2, 2.25, 3, 5, 7, 7]


def test_findings_of_made_up_numbers(claims, tmp_path):
    """Of the most steps at which both have two seeds; others are not measured."""
    experiment, results = claims("experiment"), claims("results")
    numbers = results.Results(tmp_path / "n.json")
    for steps, shift in ((10, 5.0), (20, -1.0)):
        for seed in range(3):
            numbers.add(results.Results.key("a", seed, steps), "m", seed + shift, 0.0)
            numbers.add(results.Results.key("b", seed, steps), "m", 1.001 * seed - 0.001, 0.0)
    numbers.add(results.Results.key("a", 0, 30), "m", 0.0, 0.0)
    numbers.add(results.Results.key("b", 0, 30), "m", 0.0, 0.0)
    found = experiment.compare(numbers, "a is less", "number", ("a", "m"), ("b", "m"), -1)
    assert (found.steps, found.found.mean) == (20, pytest.approx(-1.0))
    assert found.found.half == pytest.approx(4.303 * 0.001 / math.sqrt(3))
    assert found.a == ("a", 0.0)
    assert "difference -1.000 ± 0.002, 3 seeds: shown" in experiment.describe(found)
    other = experiment.compare(numbers, "", "", ("a", "m"), ("b", "m"), -1, steps=10)
    assert other.found.mean == pytest.approx(5)
    none = experiment.compare(numbers, "none", "", ("a", "m"), ("c", "m"), -1)
    assert none.found is None
    assert experiment.describe(none) == "none: not measured"


def test_the_page_shows_the_kept_numbers(claims):
    """The tables are those that the script writes from the JSON files, and all are on the page."""
    report = claims("claims_report")
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    for name, text in report.tables(report.kept_numbers()).items():
        assert (ROOT / "docs" / "tables" / f"{name}.md").read_text(encoding="utf-8") == text, name
        assert f"```{{include}} tables/{name}.md" in page
    for claim in report.CLAIMS:
        assert (ROOT / "docs" / "_static" / f"claims_{claim.name}.png").exists()
        assert f"## {claim.title}\n" in page
        assert f"python examples/claims/{claim.name}.py\n" in page


class Planned:
    """A lab that trains and measures nothing, and collects what would be measured."""

    scale, runs = "small", Path("runs")

    def __init__(self, options, recipes):
        self.only, self.text, self.recipes = options.only, options.measure, recipes
        self.keys, self.memory = set(), {}

    def folder(self, *_):
        return self.runs

    def measure(self, name, seed, steps, measure, _):
        assert name in self.recipes
        if (not self.only or name in self.only) and self.text in measure:
            self.keys.add((f"{name}, seed {seed}, {steps} steps", measure))

    def note(self, name, seed, steps, _):
        self.keys.add((f"{name}, seed {seed}, {steps} steps", None))


def test_every_kept_number_has_a_command(claims):
    """A reader who doubts a number finds on the page what measures it again."""
    report, recipes = claims("claims_report"), claims("recipes").RECIPES
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for claim in report.CLAIMS:
        start, planned = f"python examples/claims/{claim.name}.py", set()
        for line in page.splitlines():
            if line.startswith(start):
                options = claim.parser("").parse_args(shlex.split(line.removeprefix(start)))
                lab = Planned(options, recipes)
                claim.measure(lab, *claim.budget(options))
                planned |= lab.keys
        kept = claims("results").Results(claim.path(claims("results").FOLDER, "small"))
        assert kept.numbers
        for key, measures in kept.numbers.items():
            for measure in measures:
                assert (key, measure) in planned or (key, None) in planned, (key, measure)


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_recipe_is_a_preset(claims, scale):
    recipes = claims("recipes")
    for name, recipe in recipes.RECIPES.items():
        settings = recipe.settings(scale, seed=4, steps=7)
        source, channels = ("color-patches", 3) if "color" in name else ("glyphs", 1)
        assert settings["data"]["source"] == source, name
        assert settings["data"]["channels"] == channels, name
        assert settings["data"]["size"] == (16 if scale == "small" else 32)
        assert (settings["training"]["seed"], settings["training"]["steps"]) == (4, 7)
        assert "augmentation" not in settings


def test_a_claim_draws_without_numbers(claims, tmp_path):
    report, results = claims("claims_report"), claims("results")
    for claim in report.CLAIMS:
        empty = results.Results(tmp_path / f"{claim.name}.json")
        assert claim.draw(empty).axes
        assert {report.verdict_of(one) for one in claim.findings(empty)} <= {"not measured"}


def within(band, value):
    """Whether a new seed's value is within twice the band in which 95% of seeds are."""
    return abs(value - band.mean) < 2 * band.half * math.sqrt(band.count + 1)


def guarded(sides, results, intervals, steps):
    """Return the bands of kept numbers: of the difference, of a and of b."""
    a, b = (
        {seed: s.value(v) for seed, v in results.seeds(s.recipe, steps, s.measure).items()}
        for s in sides
    )
    return (
        intervals.difference(a, b),
        intervals.interval(a.values()),
        intervals.interval(b.values()),
    )


def test_bands_of_guards(claims, tmp_path):
    """Twice the 95% band of a new seed; differences of pairs have their own, narrower one."""
    module, results, intervals = claims("guards"), claims("results"), claims("intervals")
    sides, numbers = module.GUARDS["stable targets"], results.Results(tmp_path / "n.json")
    for seed, values in enumerate(((1.0, 2.0), (2.0, 3.1), (3.0, 3.9), (4.0, 5.0))):
        for side, value in zip(sides, values, strict=True):
            key = results.Results.key(side.recipe, seed, 100)
            numbers.add(key, side.measure, {"3": value}, 0.0)
    difference, a, b = guarded(sides, numbers, intervals, 100)
    deviation, quantile = math.sqrt(5 / 3), 3.182
    assert (a.mean, a.count, b.count) == (2.5, 4, 4)
    reach = 2 * quantile * deviation * math.sqrt(1 + 1 / 4)
    assert within(a, 2.5 + 0.99 * reach)
    assert not within(a, 2.5 + 1.01 * reach)
    assert within(difference, -1.2)
    assert not within(difference, 0.0)


GUARDS = ["cosine", "width", "importance sampling", "sub-VP", "stable targets", "corrector", "Heun",
          "inpainting", "colorization"]  # fmt: skip


def test_every_guard_has_kept_numbers(claims):
    """Three seeds at least, on both sides of every guard."""
    module, results, intervals = claims("guards"), claims("results"), claims("intervals")
    kept = results.Results(module.CLAIM.path(results.FOLDER, "small"))
    assert list(module.GUARDS) == GUARDS
    for name, sides in module.GUARDS.items():
        assert guarded(sides, kept, intervals, 100)[0].count >= 3, name


@pytest.mark.slow
@pytest.mark.parametrize("name", GUARDS)
def test_a_new_seed_agrees_with_the_kept_ones(claims, tmp_path, name):
    """The cheapest form of an experiment, 100 steps, in a minute of one core."""
    module, results, intervals = claims("guards"), claims("results"), claims("intervals")
    sides, (steps,) = module.GUARDS[name], module.CLAIM.steps
    kept = results.Results(module.CLAIM.path(results.FOLDER, "small"))
    lab = claims("experiment").Lab(results.Results(tmp_path / "n.json"), tmp_path, "small")
    x, y = (side.found(lab, 100, steps) for side in sides)
    bands = guarded(sides, kept, intervals, steps)
    for found, band in zip((x - y, x, y), bands, strict=True):
        assert within(band, found), (found, band)


@pytest.mark.slow
def test_variances_of_stable_targets_on_glyphs(claims, monkeypatch):
    """At noise 3 the variance is a tenth with 1,024 references, half of that with 4,096."""
    module = claims("stable_targets")
    monkeypatch.setattr(module, "LEVELS", (3.0,))
    monkeypatch.setattr(module, "STATES", 200)
    found = {name: table["value"][0] for name, table in module.variances(16).items()}
    plain = found["denoising"]
    assert 3 < plain < 7
    assert 0.03 < found["stable, n = 1024"] / plain < 0.2
    assert found["stable, n = 4096"] < 0.6 * found["stable, n = 1024"]
