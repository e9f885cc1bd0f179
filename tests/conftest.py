"""Shared processes and oracles."""

import gc
import logging

import pytest
import torch
from hypothesis import settings

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    FlowMatchingSDE,
    ForwardSDE,
    GaussianMixtureModel,
    SubVPSDE,
)

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("suite")
torch.set_num_threads(1)  # the tensors are small
# pytest attaches its handlers to each logger that does not propagate, three times a test.
for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
    logging.getLogger(name).propagate = True

SDES = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(sigma_min=0.01, sigma_max=20.0),
    "edm": EDMSDE(sigma_min=0.002, sigma_max=20.0),
    "chain": DDPMChain.linear(1000),
    "flow": FlowMatchingSDE(),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Take the modules and thousands of collected tests out of every pass of the collector."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Fail the test that leaves gradients disabled, not those that follow."""
    result = yield
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        pytest.fail("expected gradients enabled after the test")
    return result


@pytest.fixture(scope="session", params=SDES)
def sde(request) -> ForwardSDE:
    return SDES[request.param]


@pytest.fixture(scope="session")
def mixture(sde) -> GaussianMixtureModel:
    """Return a mixture of two different Gaussians in the plane with unequal weights."""
    return GaussianMixtureModel(
        sde, means=[[-1.0, 0.0], [1.0, 0.5]], stds=[0.2, 0.3], weights=[0.3, 0.7]
    )
