import re

from support.pictures import check_picture


def test_small_run(example, picture, capsys):
    """Ten steps are enough to be nearer to the posterior than the data are."""
    example.main(["--steps", "20", "--samples", "100", "--output", str(picture)])
    rows = re.findall(r"^(\S.*?)  +(\d\.\d{4})$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 5
    check_picture(picture)
    model = example.spiral()
    linear, _ = example.problems(model)
    right = example.exact(model, linear, 500)
    assert float((right[:, 0] - 0.35).abs().mean()) < 0.15
    baseline = example.energy_distance(model.sample(500), right)
    assert float(dict(rows)["LinearGaussianGuidance (MMPS)"]) < 0.5 * baseline
