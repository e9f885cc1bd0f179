import re


def test_table_has_a_row_per_predictor_and_budget(example, capsys):
    argv = ["--train-steps", "3", "--evaluations", "3", "5", "--samples", "4", "--repeats", "2"]
    example.main([*argv, "--sdes", "vp"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vp |")]
    assert len(rows) == 4
    for row in rows:
        assert len(re.findall(r"\d+\.\d+%? ± \d+\.\d+%?", row)) == 4
