"""Work shared by processes: in order, equally often called, and errors reach everyone."""

import pytest
from support.processes import run_in_processes

from diffusionkit.distributed._shared_work import share

PROGRAM = """
from diffusionkit.distributed._shared_work import share

calls, results = [], []
for n in (0, 1, 4, 5):
    results.append(share(lambda i: calls.append(i) or (i, rank), range(n)))

def fails(i):
    if i == 1:
        raise ValueError("item 1")

try:
    share(fails, range(4))
except Exception as error:
    told = f"{type(error).__name__}: {error}"
result = calls, results, told
"""


def test_results_are_in_order_and_calls_equal_in_number(tmp_path):
    found = run_in_processes(3, PROGRAM, tmp_path)
    calls = [calls for calls, _, _ in found]
    assert calls == [[0, 0, 3, 0, 3], [0, 1, 3, 1, 4], [0, 2, 3, 2, 4]]
    for _, results, _ in found:
        assert results == [[(i, i % 3) for i in range(n)] for n in (0, 1, 4, 5)]
    other = "RuntimeError: process 1 of 3 failed: ValueError: item 1"
    assert [told for _, _, told in found] == [other, "ValueError: item 1", other]


def test_one_process_does_everything():
    assert share(lambda i: i * i, [1, 2, 3]) == [1, 4, 9]
    with pytest.raises(ZeroDivisionError):
        share(lambda i: 1 / i, [0])
