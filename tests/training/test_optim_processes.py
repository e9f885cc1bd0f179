"""Optimizer steps of several processes: one norm, one decision, sharded and whole gradients."""

import math

import pytest
from support.processes import run_in_two_processes

PROGRAM = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from diffusionkit import clipped_step

mesh = init_device_mesh("cpu", (2,))
values = [torch.arange(6.0).view(3, 2), torch.full((2, 2), -3.0), torch.ones(5), torch.ones(2)]
layouts = [[Shard(0)], [Shard(1)], [Replicate()], None]

def made(dtype=torch.float32, split=True):
    params = []
    for value, layout in zip(values, layouts):
        def put(x):
            x = x.to(dtype if layout else torch.float32, copy=True)
            return distribute_tensor(x, mesh, layout) if split and layout else x
        params.append(nn.Parameter(put(torch.zeros_like(value))))
        params[-1].grad = put(value)
    return params, torch.optim.SGD(params, lr=1.0)

def whole(params):
    return [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in params]

result = {}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for some in (None, slice(0, 2)):
        steps = []
        for split in (True, False):
            params, optimizer = made(dtype, split)
            report = clipped_step(optimizer, 2.0, parameters=some and params[some])
            steps.append((report.norm, whole(params)))
        result[str(dtype), str(some)] = steps

# Gradients that are whole are those of a rank; all ranks clip by the largest norm.
p = nn.Parameter(torch.zeros(2))
p.grad = torch.tensor([3.0, 4.0]) * (1 + rank)
result["unequal"] = clipped_step(torch.optim.SGD([p], lr=1.0), 1.0).norm, p.tolist()

for name, bad in (("inf", float("inf")), ("nan", float("nan"))):
    params, optimizer = made()
    if rank == 1:
        params[3].grad[0] = bad
    report = clipped_step(optimizer)
    result[name] = report.skipped, report.norm, [float(x.abs().sum()) for x in whole(params)]

p = nn.Parameter(torch.zeros(2))
if rank == 0:
    p.grad = torch.ones(2)
try:
    clipped_step(torch.optim.SGD([p], lr=1.0))
except ValueError as error:
    result["missing"] = str(error)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_in_two_processes(PROGRAM, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("some", "norm"), [("None", math.sqrt(98)), ("slice(0, 2, None)", math.sqrt(91))]
)
def test_sharded_and_whole_gradients_are_clipped_as_in_one_process(ranks, dtype, some, norm):
    """The sums of squares of the gradients are 55, 36, 5 and 2."""
    for found in ranks:
        (sharded, params), (single, expected) = found[f"torch.{dtype}", some]
        assert sharded == pytest.approx(norm, rel=1e-6)
        assert single == pytest.approx(norm, rel=1e-6)
        for p, q in zip(params, expected, strict=True):
            assert abs(p.double() - q.double()).max() < 1e-6


def test_all_processes_clip_by_the_largest_norm(ranks) -> None:
    for rank, found in enumerate(ranks):
        norm, p = found["unequal"]
        assert norm == pytest.approx(10.0)
        assert p == pytest.approx([-0.3 * (1 + rank), -0.4 * (1 + rank)], rel=1e-5)


@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_a_bad_gradient_of_one_process_skips_the_step_in_all(ranks, bad) -> None:
    assert [found[bad] for found in ranks] == [(True, math.inf, [0.0] * 4)] * 2


def test_a_process_without_gradients_raises_in_all(ranks) -> None:
    for found in ranks:
        assert found["missing"].startswith("parameters: expected gradients, got none")
