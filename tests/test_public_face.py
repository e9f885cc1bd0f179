"""The rule of the flat namespace: what users compose, and nothing else."""

import dataclasses
import inspect

import pytest
from torch import nn

import diffusionkit
from diffusionkit import interfaces, likelihood, sampling, sde, training

# Abstract classes that users subclass in scripts: the interfaces, and the one between networks and
# score models.
ABSTRACT = {*interfaces.__all__, "NetworkModel"}
VALUES = {"Perturbed", "Prediction", "Step"}  # what a user's part takes and returns


@pytest.mark.parametrize("name", diffusionkit.__all__)
def test_flat_names_are_parts_functions_or_interfaces(name):
    value = getattr(diffusionkit, name)
    assert not inspect.ismodule(value)
    if inspect.isclass(value):
        assert not inspect.isabstract(value) or name in ABSTRACT, "a base for extension"
        result = dataclasses.is_dataclass(value) and not any(
            hasattr(value, method) for method in ("__call__", "step", "predict", "marginal")
        )
        parts = (nn.Module, BaseException, interfaces.ForwardSDE, sampling.TimeTravel)
        assert not result or name in VALUES or issubclass(value, parts) or "Decoder" in name


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            likelihood,
            ["Bound", "BitsPerDim", "BitsPerStep", "ChainBound", "Dequantized", "Divergence"],
        ),
        (sampling, ["LinearPredictor", "SamplerState", "StepCoefficients", "TwoStagePredictor"]),
        (sde, ["Chain"]),
        (training, ["Checkpoint", "StepReport", "power_coefficients"]),
    ],
)
def test_results_and_bases_come_from_their_sub_package(package, names):
    for name in names:
        assert name in package.__all__
        assert name not in diffusionkit.__all__


@pytest.mark.parametrize("package", [sde, sampling, training, likelihood], ids=lambda p: p.__name__)
def test_flat_names_are_those_of_the_sub_packages(package):
    for name in set(package.__all__) & set(diffusionkit.__all__):
        assert getattr(diffusionkit, name) is getattr(package, name)
