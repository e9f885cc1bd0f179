import re

import pytest
from support import seeded
from support.pictures import check_picture

TINY = ["--train-steps", "3", "--steps", "4"]


def test_small_run(example, picture, capsys):
    example.main([*TINY, "--toy-steps", "3", "--output", str(picture)])
    check_picture(picture)
    output = capsys.readouterr().out
    assert "sampled (64, 1, 8, 8) in 9 network evaluations" in output
    match = re.search(r"energy distance to the test digits ([\d.]+), real digits ([\d.]+)", output)
    distance, attainable = (float(x) for x in match.groups())
    assert 0 < attainable < distance


@pytest.mark.parametrize(
    "parts",
    [
        "subvp x0 min-snr stratified ancestral annealed-langevin",
        "ve edm edm log-normal euler-maruyama none",
        "edm v likelihood uniform none langevin",
    ],
)
def test_components_can_be_combined(example, parts):
    names = ("sde", "model", "weighting", "times", "predictor", "corrector")
    argv = [x for name, part in zip(names, parts.split(), strict=True) for x in (f"--{name}", part)]
    samples = example.learn_digits(example.options([*TINY, *argv]), seeded())
    assert samples.shape == (64, 1, 8, 8)
    assert samples.isfinite().all()


def test_neither_predictor_nor_corrector_is_an_error(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--predictor", "none", "--corrector", "none"])
    assert "--predictor, --corrector: expected at least one" in capsys.readouterr().err
