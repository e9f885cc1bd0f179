import importlib
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--train-steps", "3", "--steps", "4"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    yield importlib.import_module
    for name in names:  # other tests must not find them
        sys.modules.pop(name, None)


@pytest.fixture
def picture(tmp_path):
    return tmp_path / "somewhere" / "picture.png"


def size_of_png(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def check_picture(path):
    width, height = size_of_png(path)
    assert 1000 < width < 4000
    assert 500 < height < 4000
    assert path.stat().st_size > 20_000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def figures(output, row):
    (line,) = [line for line in output.splitlines() if line.startswith(row)]
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line.removeprefix(row))]


def test_quickstart(example, picture, capsys):
    example("quickstart").main([*TINY, "--samples", "20", "--output", str(picture)])
    check_picture(picture)
    output = capsys.readouterr().out
    assert re.search(r"training +3 steps, \d+ s", output)
    assert re.search(r"sampling +20 images, \d+ s, 9 network evaluations", output)
    share, real, gaussian = figures(output, "confidently classified (p >= 0.9)")
    assert 0 <= share <= 100
    assert 84 < real < 94
    assert 10 < gaussian < 50
    assert len(figures(output, "share of the rarest digit")) == 3
    assert figures(output, "closer to a training digit than usual")[1] == pytest.approx(50, abs=0.5)
    distance, attainable, _ = figures(output, "energy distance to the test digits")
    assert 0 < attainable < distance
    assert sum(figures(output, "digits among the samples")) == pytest.approx(100, abs=0.5)
    assert str(picture) in output


@pytest.mark.parametrize("sde", ["vp", "subvp", "ve"])
def test_quickstart_with_each_process(example, sde, picture):
    quickstart = example("quickstart")
    sampler = {"vp": "ancestral", "subvp": "ddim", "ve": "langevin"}[sde]
    argv = [*TINY, "--samples", "5", "--output", str(picture), "--sde", sde, "--sampler", sampler]
    quickstart.main(argv)
    check_picture(picture)


def test_quickstart_samplers(example):
    import torch

    quickstart = example("quickstart")
    from diffusionkit import VPSDE, EpsModel

    model = EpsModel(lambda x, noise_label: 0.1 * x, VPSDE())
    for name in [*quickstart.SAMPLERS, "ode"]:
        drawn = quickstart.draw(name, model, 3, 2, torch.Generator().manual_seed(0))
        assert drawn.images.shape == (3, 1, 8, 8)
        assert drawn.path.shape == (len(drawn.times), 3, 1, 8, 8)
        assert drawn.times == sorted(drawn.times, reverse=True)
        assert drawn.evaluations > 0


def test_quickstart_is_reproducible(example, tmp_path, capsys):
    quickstart = example("quickstart")
    pictures, tables = [], []
    for seed, name in ((1, "a.png"), (1, "b.png"), (2, "c.png")):
        argv = [*TINY, "--samples", "8", "--seed", str(seed), "--output", str(tmp_path / name)]
        quickstart.main(argv)
        pictures.append((tmp_path / name).read_bytes())
        tables.append(capsys.readouterr().out.partition("real")[2].partition("picture")[0])
    assert pictures[0] == pictures[1] != pictures[2]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sde", "wave"], "invalid choice: 'wave'"),
        (["--sampler", "none"], "invalid choice: 'none'"),
        (["--steps", "0"], "expected a positive whole number, got '0'"),
        (["--samples", "many"], "expected a positive whole number, got 'many'"),
        (["--device", "abacus"], "expected a device torch can use, got 'abacus'"),
        (["--output", "picture.txt"], "expected a .png, .pdf or .svg file, got 'picture.txt'"),
    ],
)
def test_quickstart_refuses(example, argv, message, capsys):
    with pytest.raises(SystemExit):
        example("quickstart").main(argv)
    assert message in capsys.readouterr().err


def test_compose(example, picture, capsys):
    example("compose").main([*TINY, "--toy-steps", "3", "--output", str(picture)])
    check_picture(picture)
    output = capsys.readouterr().out
    assert "sampled (64, 1, 8, 8) in 9 evaluations of the network" in output
    distance, attainable = figures(output, "energy distance to the test digits")
    assert 0 < attainable < distance


@pytest.mark.parametrize(
    "parts",
    [
        "subvp x0 min-snr stratified ancestral annealed-langevin",
        "ve edm edm log-normal euler-maruyama none",
        "edm v likelihood uniform none langevin",
    ],
)
def test_compose_learns_with_any_parts(example, parts):
    import torch

    compose = example("compose")
    names = ("sde", "model", "weighting", "times", "predictor", "corrector")
    argv = [x for name, part in zip(names, parts.split(), strict=True) for x in (f"--{name}", part)]
    args = compose.options([*TINY, *argv])
    samples = compose.learn_digits(args, torch.Generator().manual_seed(0))
    assert samples.shape == (64, 1, 8, 8)
    assert samples.isfinite().all()


def test_compose_refuses_no_sampler(example, capsys):
    with pytest.raises(SystemExit):
        example("compose").main(["--predictor", "none", "--corrector", "none"])
    assert "expected a predictor, a corrector or both" in capsys.readouterr().err


def test_pc_vs_predictor(example, capsys):
    argv = ["--train-steps", "3", "--evaluations", "3", "5", "--samples", "4", "--repeats", "2"]
    example("pc_vs_predictor").main([*argv, "--sdes", "vp"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vp |")]
    assert len(rows) == 4
    for row in rows:
        assert len(re.findall(r"\d+\.\d+%? ± \d+\.\d+%?", row)) == 4
