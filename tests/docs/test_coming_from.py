"""The programs of other libraries on the pages "Coming from" give the numbers that are kept there.

Most are repositories without a package: put a clone of one on PYTHONPATH to run its program.
"""

import io
import re
from contextlib import redirect_stdout

import pytest
import torch
from support.snippets import ROOT, program


@pytest.mark.parametrize("peer", ["azula", "edm", "improved_diffusion", "score_sde"])
def test_kept_numbers_are_those_of_the_other_library(peer) -> None:
    page = ROOT / "docs" / "coming_from" / f"{peer}.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    theirs, ours = {}, {}
    with torch.random.fork_rng():
        try:
            exec(code, theirs)
        except ImportError as error:
            pytest.skip(f"{peer}: {error}")
    with redirect_stdout(io.StringIO()):
        exec(program(page), ours)
    torch.testing.assert_close(
        theirs["x"].flatten()[:4].float(), ours["theirs"], rtol=0, atol=2e-5, check_dtype=False
    )
