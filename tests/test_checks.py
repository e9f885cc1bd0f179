"""Values are read on the CPU, and on every device inside `value_checks`."""

import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusionkit import VPSDE, EDMWeighting
from diffusionkit._checks import check_samples, readable
from diffusionkit.networks import MLP
from diffusionkit.testing import value_checks

# A tensor on a GPU.
ON_DEVICE = SimpleNamespace(device=torch.device("cuda"), is_cpu=False, is_meta=False)


def test_values_on_devices_are_read_inside_value_checks_only() -> None:
    assert readable(torch.zeros(1))
    assert not readable(ON_DEVICE)
    with value_checks():
        assert readable(ON_DEVICE)
        assert not readable(torch.zeros(1, device="meta"))
        with value_checks():
            pass
        assert readable(ON_DEVICE)
        found: list[bool] = []
        other = threading.Thread(target=lambda: found.append(readable(ON_DEVICE)))
        other.start()
        other.join()
        assert found == [False]
    with pytest.raises(RuntimeError, match="stop"), value_checks():
        raise RuntimeError("stop")
    assert not readable(ON_DEVICE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPSDE(beta_max=np.float32(20)), "beta_max: {} float32 20; convert it by float(x)"),
        (
            lambda: VPSDE(beta_max=torch.tensor(20)),
            "beta_max: {} Tensor 20; convert it by float(x)",
        ),
        (lambda: EDMWeighting(np.float32(0.5)), "got float32 0.5; convert it by float(x)"),
        (lambda: EDMWeighting(torch.tensor(0.5)), "shape (); convert it by float(x)"),
        (lambda: MLP(np.int64(2)), "features: {} int64 2; convert it by int(x)"),
        (lambda: MLP(2.0), "features: {} float 2; convert it by int(x)"),
        (lambda: MLP(2.5), "features: {} float 2.5"),
        (lambda: MLP(torch.ones(2)), "features: {} Tensor"),
        (lambda: MLP(True), "features: {} bool"),
        (lambda: MLP(torch.ones((), device="meta")), "features: {} Tensor"),
        (
            lambda: VPSDE().prior_sample(tuple(np.array([4, 2]))),
            "(np.int64(4), np.int64(2)); convert it by tuple(map(int, shape))",
        ),
        (lambda: VPSDE().prior_sample((0, 2)), "expected positive integers (B, *D), got (0, 2)"),
    ],
)
def test_numbers_of_other_libraries_are_shown_with_how_to_convert_them(make, message) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    pattern = re.escape(message).replace(re.escape("{}"), "expected an? (number|integer), got")
    assert re.search(pattern + "$", str(error.value))


def test_compiled_and_transformed_code_is_not_read() -> None:
    seen = []

    def function(x):
        seen.append(readable(x))
        return x

    with value_checks():
        torch.func.vmap(function)(torch.zeros(2, 3))
        torch.compile(lambda x: x + readable(x), backend="eager", fullgraph=True)(torch.zeros(2))
    assert seen == [False]


@pytest.mark.slow
@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_environment_turns_checks_on(value, expected) -> None:
    code = (
        "import torch, types; from diffusionkit._checks import readable;"
        "print(readable(types.SimpleNamespace(is_cpu=False, is_meta=False)))"
    )
    environment = {**os.environ, "DIFFUSIONKIT_CHECKS": value}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_finite(dtype) -> None:
    x = torch.zeros(4, 3, dtype=dtype)
    check_samples(x)
    check_samples(torch.full((2, 100), torch.finfo(dtype).max, dtype=dtype))  # the sum overflows
    for value in (float("nan"), float("inf")):
        x[1:3, 1] = value
        with pytest.raises(ValueError, match=r"samples: .* got NaN or infinity in 2 of 4 samples"):
            check_samples(x)
