"""Subsequences of steps, equal to those of the released code of improved DDPM."""

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusionkit.sde._subsequence import subsequence
from diffusionkit.sde.smld_chain import SMLDChain

# Steps of the chain, specification, number and sum of the selected steps, and the sha256 of the
# selected steps joined by commas.
REFERENCE = [
    (1000, "250", 250, 124875, "d7b0f48aae57b0da26bd5b24b757c7398375d94fd95f52f8fd20bae7557e182b"),
    (1000, [21], 21, 10489, "2256c158d10aed3375cc1c08a4a350d81c8bc42f66e06b2dbf59a10432e2ede3"),
    (1000, "ddim25", 25, 12000, "5b9ec4c84a79d007830d0e0705eecc7c8ed0f4c8c8bd8915a1123296b56d0eb0"),
    (4000, "100", 100, 199950, "9eadc57a494452ee9ae53ddb814b55c098ce464de11fffee94b5820901e6b559"),
    (4000, "ddim50", 50, 98000, "04b0f0a7dc8fe71eeb7c00d32cf869b0ffa95c2b41030bd4924443634095efc4"),
    (300, [10, 15, 20], 45, 7727,
     "17dc1f7fd73284394d74b9d2bfb541c52a4cf87227c9df3b604394db1669d816"),
    (25, [7], 7, 84, "7039130a494713b98326ed2ed1d0925645be4aecdf45c1b501ae05ceb96c2960"),
    (11, [2, 3, 1], 6, 28, "7f6e0c56c2b42b007135b3d8ba2b90023b7f8cc9fff5a0cb4c99b525d9ec17d5"),
    (1000, "10,20,30", 60, 36655,
     "a1b1653431049cf617b7b8dfa8f8a1bb4b4a0189d8dc349725545d78d32c8a21"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "spec", "count", "total", "digest"), REFERENCE)
def test_same_steps_as_the_released_code(steps, spec, count, total, digest) -> None:
    selected = subsequence(spec, steps)
    assert (len(selected), sum(selected)) == (count, total)
    assert hashlib.sha256(",".join(map(str, selected)).encode()).hexdigest() == digest


def test_equivalent_specifications() -> None:
    chain = SMLDChain.geometric(100)
    assert chain.subsequence(7) == chain.subsequence("7") == chain.subsequence((7,))
    assert chain.subsequence([4, 3]) == chain.subsequence("4,3") == chain.subsequence(" 4, 3 ")
    assert chain.subsequence(1) == [0]
    assert chain.subsequence(100) == chain.subsequence("ddim100") == list(range(100))


@given(st.integers(2, 300), st.data())
def test_one_section_includes_the_first_and_the_last_step(steps, data) -> None:
    count = data.draw(st.integers(2, steps))
    selected = subsequence(count, steps)
    assert len(selected) == count
    assert selected[0] == 0
    assert selected[-1] == steps - 1
    assert all(a < b for a, b in itertools.pairwise(selected))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("ddim1", 'integer stride over 1000 gives, the nearest being "ddim2", got "ddim1"'),
        ("ddim300", 'the nearest being "ddim250" or "ddim334", got "ddim300"'),
        ("ddim2000", 'the nearest being "ddim1000", got "ddim2000"'),
        ("ddim", '"ddimN", "N" or "N,N,...".*got \'ddim\''),
        ("ddim-5", "got 'ddim-5'"),
        ("many", "got 'many'"),
        ("10,,20", "got '10,,20'"),
        ("1001", "1 to 1000 of the 1000 steps in section 0 of 1, got 1001 in '1001'"),
        ([10, 501], "1 to 500 of the 500 steps in section 1 of 2, got 501"),
        ([0, 5], "got 0 in"),
        (-5, "got -5"),
    ],
)
def test_invalid_specifications_raise(spec, match) -> None:
    with pytest.raises(ValueError, match=f"spec: expected.*{match}"):
        subsequence(spec, 1000)


@pytest.mark.parametrize("spec", [None, 2.5, True, [], [2.5], [True], {10}])
def test_specifications_of_other_types_raise(spec) -> None:
    with pytest.raises(TypeError, match='spec: expected a string "ddimN"'):
        subsequence(spec, 1000)
