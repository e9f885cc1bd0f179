import re

import pytest
from support.pictures import check_picture


@pytest.mark.slow
def test_guidance_raises_class_accuracy(example, picture, capsys):
    example.main(
        ["--train-steps", "150", "--samples", "100", "--steps", "8", "--scales", "0", "4",
         "--output", str(picture)]
    )  # fmt: skip
    rows = {
        row.split()[0]: [float(cell.rstrip("%")) for cell in row.split()[1:]]
        for row in re.findall(r"^(?:0|4|training) .*%$", capsys.readouterr().out, re.M)
    }
    assert rows["training"][0] > 95
    assert rows["0"][0] < 40  # unconditional
    assert rows["4"][0] > 60
    check_picture(picture)
