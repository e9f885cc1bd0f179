"""Processes of torch.distributed: defaults without a group, and gathering with one."""

import torch
from support.processes import run_in_two_processes

from diffusionkit._distributed import (
    barrier,
    gather_objects,
    gather_rows,
    is_distributed,
    rank_and_world_size,
)

PROGRAM = """
from diffusionkit._distributed import *

rows = gather_rows(torch.full((1 + 2 * rank, 2), rank))
empty = gather_rows(torch.full((rank, 3), 0.5))
result = rows, empty, gather_objects({"rank": rank}), rank_and_world_size(), rank_and_world_size(5)
"""


def test_processes_gather_unequal_rows_in_rank_order(tmp_path) -> None:
    for rank, found in enumerate(run_in_two_processes(PROGRAM, tmp_path)):
        rows, empty, objects, *defaults = found
        assert rows.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert empty.tolist() == [[0.5] * 3]
        assert objects == [{"rank": 0}, {"rank": 1}]
        assert defaults == [(rank, 2), (5, 2)]


def test_without_a_process_group() -> None:
    x = torch.ones(2, 3)
    assert not is_distributed()
    assert gather_rows(x) is x
    assert gather_objects(x)[0] is x
    assert rank_and_world_size() == (0, 1)
    assert rank_and_world_size(2, 3) == (2, 3)
    barrier()
