import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit import suggest_sigma_max


@given(n=st.integers(2, 40), block=st.integers(1, 16), seed=st.integers(0, 99))
def test_suggested_sigma_max_is_the_largest_distance(n, block, seed):
    data = torch.randn(n, 2, 3, generator=seeded(seed)) ** 3
    pairs = itertools.combinations(data.double(), 2)
    expected = max(float((a - b).square().sum().sqrt()) for a, b in pairs)
    assert abs(suggest_sigma_max(data, block=block) - expected) < 1e-9 * expected


def test_most_pairs_of_a_large_set_are_skipped(monkeypatch):
    compared = 0
    cdist = torch.cdist

    def counting(a, b):
        nonlocal compared
        compared += len(a) * len(b)
        return cdist(a, b)

    monkeypatch.setattr(torch, "cdist", counting)
    data = torch.randn(4000, 3, generator=seeded())
    suggest_sigma_max(data, block=64)
    assert compared < 0.05 * 4000**2 / 2
