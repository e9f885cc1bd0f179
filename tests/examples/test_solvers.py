import re

from support.pictures import check_picture


def test_small_run(example, picture, capsys, monkeypatch):
    monkeypatch.setattr(example, "EVALUATIONS", (6, 40))
    monkeypatch.setattr(example, "TOLERANCES", (0.5,))
    example.main(["--train-steps", "20", "--samples", "50", "--output", str(picture)])
    mixture, errors, energies = (
        dict(re.findall(r"^(.{20})(.*)$", part, re.M))
        for part in capsys.readouterr().out.split("\nE")
    )
    names = [f"{name:<20}" for name in example.DETERMINISTIC]
    assert set(names) <= set(mixture)
    assert set(names) <= set(errors)
    assert {f"{name:<20}" for name in ("Ancestral", "adaptive")} <= set(energies)
    last = {name: float(mixture[name].split()[-1]) for name in names}
    assert min(last.values()) < 0.1 * last[f"{'DDIM':<20}"]
    check_picture(picture)
