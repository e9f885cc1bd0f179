"""Bad values for every parameter of every public callable, and valid arguments to start from."""

import functools
import importlib
import inspect
import math
import re
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import diffusionkit as dk
from diffusionkit import (
    calibration,
    checkpoints,
    control,
    interop,
    likelihood,
    metrics,
    networks,
    training,
)
from diffusionkit import data as image_data
from diffusionkit.diagnostics import Estimate

PACKAGES = (
    "",
    "calibration",
    "checkpoints",
    "control",
    "data",
    "decoders",
    "diagnostics",
    "distributed",
    "interop",
    "likelihood",
    "metrics",
    "models",
    "networks",
    "ops",
    "random",
    "sampling",
    "sde",
    "testing",
    "training",
)


def _itself() -> list[Any]:
    nested: list[Any] = []
    nested.append(nested)
    return nested


BAD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a word": lambda: "x",
    "an empty string": lambda: "",
    "bytes": lambda: b"x",
    "an empty list": list,
    "an empty dictionary": dict,
    "an empty tuple": tuple,
    "a list of None": lambda: [None],
    "an object": object,
    "a class": lambda: int,
    "a function": lambda: lambda: None,
    "NaN": lambda: math.nan,
    "infinity": lambda: math.inf,
    "-infinity": lambda: -math.inf,
    "-1": lambda: -1,
    "0": lambda: 0,
    "0.5": lambda: 0.5,
    "10**30": lambda: 10**30,
    "-10**30": lambda: -(10**30),
    "10**400": lambda: 10**400,
    "True": lambda: True,
    "a complex number": lambda: 1j,
    "a Decimal": lambda: Decimal("0.5"),
    "a numpy number": lambda: np.float32(0.5),
    "a numpy integer": lambda: np.int64(2),
    "a numpy array": lambda: np.array([1.0, 2.0]),
    "an array of objects": lambda: np.array([None, "x"], dtype=object),
    "a scalar tensor": lambda: torch.tensor(0.5),
    "an empty tensor": lambda: torch.zeros(0),
    "a column": lambda: torch.full((2, 1), 0.5),
    "three numbers": lambda: torch.full((3,), 0.5),
    "integers": lambda: torch.ones(2, 2, dtype=torch.int64),
    "booleans": lambda: torch.ones(2, 2, dtype=torch.bool),
    "complex numbers": lambda: torch.ones(2, 2, dtype=torch.complex64),
    "a tensor of NaN": lambda: torch.full((2, 2), math.nan),
    "two NaN": lambda: torch.full((2,), math.nan),
    "a set": lambda: {1, 2},
    "a generator": lambda: (value for value in (None, "x")),
    "a path": lambda: Path("/nowhere/x"),
    "a list of itself": _itself,
    "a reversed pair": lambda: (1.0, -1.0),
    "a pair with NaN": lambda: (math.nan, 1.0),
    "a pair of words": lambda: ("a", "b"),
    "an unknown device": lambda: "cuda:99",
    "a layer": lambda: nn.Linear(2, 2),
}


@functools.cache
def callables() -> dict[str, Any]:
    """Return every public callable by its name: functions, concrete classes and their methods."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        module = importlib.import_module(f"diffusionkit.{package}".rstrip("."))
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and not _is_alias(value) and value not in found.values():
                found.setdefault(name, value)
    for name, value in list(found.items()):
        if inspect.isclass(value):
            for method in _methods(value):
                found[f"{name}.{method}"] = getattr(value, method)
    return {
        name: value
        for name, value in found.items()
        if not (inspect.isclass(value) and (inspect.isabstract(value) or _is_error(value)))
    }


def _is_alias(value: Any) -> bool:
    return not getattr(value, "__module__", "").startswith("diffusionkit")


def _is_error(value: type) -> bool:
    return issubclass(value, BaseException)


def _methods(cls: type) -> list[str]:
    """Return the public methods that a class itself defines, and `__call__`."""
    names = [name for name in vars(cls) if not name.startswith("_") or name == "__call__"]
    return [
        name
        for name in names
        if inspect.isfunction(getattr(vars(cls)[name], "__func__", vars(cls)[name]))
    ]


def _network(x: Tensor, noise_label: Tensor, **cond: Any) -> Tensor:
    return x * 0.1


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _model() -> Any:
    return dk.EpsModel(_network, dk.VPSDE())


def _chain_model() -> Any:
    return dk.EpsModel(_network, dk.DDPMChain.linear(25))


def _optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return torch.optim.SGD([weight], lr=0.1)


def _images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 4, 4), generator=_generator())


def _state(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 2), generator=_generator())


@functools.cache
def _folder() -> Path:
    """Return a folder with one file of each kind that the library reads."""
    folder = Path(tempfile.mkdtemp())
    dk.save_checkpoint(folder / "checkpoint.pt", nn.Linear(2, 2))
    small = dk.EpsModel(networks.MLP(2, width=4), dk.VPSDE())
    checkpoints.save_model(folder / "model.safetensors", small)
    torch.manual_seed(0)
    average = dk.PowerEMA(nn.Linear(2, 2))
    average.update(nn.Linear(2, 2))
    average.save(folder / "snapshots")
    metrics.sample_to_shards(_draw, 2, folder / "shards", progress=False)
    np.savez(folder / "images.npz", np.zeros((2, 4, 4), np.uint8))
    metrics.save_statistics(folder / "statistics.npz", _moments())
    return folder


def _draw(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.zeros(n, 3, 4, 4)


def _moments() -> metrics.FeatureMoments:
    moments = metrics.FeatureMoments()
    moments.update(_state(4, 2))
    return moments


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _flatten() -> Callable[[Tensor], Tensor]:
    return _flat


def _updated() -> dk.PowerEMA:
    average = dk.PowerEMA(nn.Linear(2, 2))
    average.update(nn.Linear(2, 2))
    return average


def _snapshots() -> list[Path]:
    return sorted((_folder() / "snapshots").iterdir())


def _bytes() -> Tensor:
    return _images().to(torch.uint8)


def _image_data() -> image_data.ImageTensors:
    return image_data.ImageTensors(_bytes().repeat(4, 1, 1, 1))


def _checkpoints() -> training.CheckpointFolder:
    return training.CheckpointFolder(_folder() / "checkpoints")


@functools.cache
def _fitted_grid() -> dk.FittedGrid:
    grid = dk.fit_grid(_model(), dk.DDIM(), (4, 2), steps=2, iterations=0, generator=_generator())
    grid.save(_folder() / "grid.json")
    return grid


def _estimate() -> Estimate:
    return Estimate(*(torch.ones(2) for _ in range(4)), "variance", "label")


Recipe = dict[str, Callable[[], Any]]

_SCHEDULER = {"trained_betas": dk.DDPMChain.linear(25).betas.tolist()}

# Valid arguments by the name of the parameter.
COMMON: Recipe = {
    "model": _model,
    "sde": dk.VPSDE,
    "network": lambda: _network,
    "classifier": lambda: dk.NoiseClassifier(lambda x, noise_label: x, dk.VPSDE()),
    "x": _state,
    "x0": _state,
    "y": _state,
    "eps": _state,
    "data": lambda: _state(4, 2),
    "real": lambda: _state(8, 2),
    "fake": lambda: _state(8, 2) + 0.1,
    "images": _images,
    "t": lambda: torch.tensor([0.5, 0.6]),
    "s": lambda: torch.tensor([0.3, 0.4]),
    "alpha": lambda: torch.tensor([0.5, 0.6]),
    "sigma": lambda: torch.tensor([0.5, 0.6]),
    "log_snr": lambda: torch.tensor([0.5, -0.6]),
    "optimizer": _optimizer,
    "class_labels": lambda: torch.tensor([0, 1]),
    "generator": _generator,
    "shape": lambda: (2, 3),
    "start": lambda: (2, 2),
    "channels": lambda: 3,
    "n": lambda: 4,
    "progress": lambda: False,
    "steps": lambda: 5,
    "path": lambda: _folder() / "checkpoint.pt",
    "loss": lambda: torch.ones(2, requires_grad=True),
    "sigma_rel": lambda: 0.1,
    "kernel": lambda: (1, 3, 3, 1),
    "weight": lambda: torch.ones(3, 3, 3, 3),
}

TINY: Recipe = {
    "width": lambda: 8,
    "multipliers": lambda: (1, 2),
    "blocks": lambda: 1,
    "attention_levels": lambda: (1,),
}
_IMAGE: Recipe = {"x": lambda: _state(2, 3, 4, 4)}
_TARGET: Recipe = {"target": lambda: None}


def _made(cls: Any, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: cls(*args, **kwargs)


# Valid arguments of one callable, where they differ; "self" makes the object of a method.
OWN: dict[str, Recipe] = {
    "any_rank": {"flag": lambda: False},
    "broadcast_object": {"value": lambda: 1},
    "gathered_weights": {"model": lambda: nn.Linear(2, 2)},
    "seed_ranks": {"seed": lambda: 0},
    "Autoguidance": {"weaker": lambda: _model(), "scale": lambda: 2.0},
    "BrownianPath": {"seeds": lambda: [1, 2]},
    "CheckpointFolder": {"folder": lambda: _folder() / "checkpoints"},
    **{
        f"CheckpointFolder.{method}": {"self": lambda: _checkpoints(), "step": lambda: 3}
        for method in ("path", "steps", "newest", "keep_last")
    },
    "ChainGrid": {"chain": lambda: dk.DDPMChain.linear(25)},
    "ChainNELBO": {"model": _chain_model},
    "ClassifierFreeGuidance": {"scale": lambda: 2.0},
    "Colorization": {"gray": lambda: _state(2, 1, 4, 4)},
    "DDPMChain": {"betas": lambda: [0.1, 0.2]},
    "DDPMChain.from_alphas_bar": {"alphas_bar": lambda: [0.9, 0.1]},
    "DDPMChain.cosine": {"s": lambda: 0.008},
    "DenoisedModel": {"fn": lambda: dk.Clip()},
    "DiscreteNELBO": {"model": lambda: dk.EpsModel(_network, dk.LogSNRSDE())},
    "EpsModel": {"data_range": lambda: (-1.0, 1.0)},
    "GaussianMixtureModel": {
        "means": lambda: [[-1.0, 0.0], [1.0, 0.0]],
        "stds": lambda: [0.1, 0.2],
        "weights": lambda: [0.5, 0.5],
    },
    "GuidanceMomentum": {"predictor": dk.Euler},
    "GradientGuidance": {"log_likelihood": lambda: lambda x0: x0.sum(1)},
    "SigmaDenoiser.forward": {
        "self": lambda: interop.as_denoiser(_model()),
        "sigma": lambda: torch.tensor([0.5, 3.0]),
    },
    "UNetAdapter.forward": {
        "self": lambda: interop.to_diffusers(_chain_model(), sample_size=4),
        "sample": lambda: _state(2, 3, 4, 4),
        "timestep": lambda: torch.tensor([3, 20]),
        "class_labels": lambda: None,
    },
    "chain_from_scheduler": {"scheduler": lambda: _SCHEDULER},
    "from_denoiser": {"denoiser": lambda: lambda x, sigma: x},
    "from_diffusers": {"unet": lambda: _network, "scheduler": lambda: _SCHEDULER},
    "sampler_from_scheduler": {"model": _chain_model, "scheduler": lambda: _SCHEDULER},
    "scheduler_config": {"model": _chain_model},
    "to_diffusers": {"model": _chain_model, "sample_size": lambda: 4},
    "IndexLabel": {"sigmas": lambda: [3.0, 2.0, 1.0]},
    "Inpainting": {"known": _state, "mask": lambda: torch.ones(2, 2)},
    "LearnedSDE": {"hidden": lambda: 4},
    "LinearGaussianGuidance": {
        "operator": lambda: control.Matrix(torch.eye(2)),
        "noise_std": lambda: 0.1,
    },
    "LinearizedGaussianGuidance": {
        "operator": lambda: lambda x0: x0**2,
        "noise_std": lambda: 0.1,
    },
    "PseudoinverseGuidance": {
        "operator": lambda: control.Matrix(torch.eye(2)),
        "noise_std": lambda: 0.1,
    },
    "LinearMeasurement": {"operator": lambda: torch.eye(2)},
    "EMA": {"model": lambda: nn.Linear(2, 2)},
    "PowerEMA": {"model": lambda: nn.Linear(2, 2)},
    "HalfLife": {"images": lambda: 100.0, "batch_size": lambda: 4},
    "HalfLife.__call__": {"self": _made(dk.HalfLife, 100.0, 4), "update": lambda: 3},
    "ReferenceBatches": {
        "dataset": lambda: [torch.ones(2)] * 8,
        "batch_size": lambda: 2,
        "reference_size": lambda: 4,
    },
    "PCSampler": {"predictor": dk.Euler},
    "SMLDChain": {"sigmas": lambda: [1.0, 2.0]},
    "VariationalDequantizer": {
        "width": lambda: 8,
        "context_width": lambda: 8,
        "components": lambda: 2,
        "blocks": lambda: 1,
        "steps": lambda: 2,
        "heads": lambda: 2,
    },
    "bits_per_dim": {"nats": lambda: torch.ones(2), "dims": lambda: 2},
    "bits_per_step": {
        "bounds": lambda: likelihood.ChainBound(prior=torch.ones(2), terms=torch.ones(2, 5)),
        "dims": lambda: 2,
    },
    "drop_conditions": {
        "condition": _state,
        "null": lambda: 0.0,
        "probability": lambda: 0.5,
    },
    "evaluate_bits_per_dim": {
        "likelihood": lambda: dk.NELBO(_model()),
        "data": lambda: _state(4, 2),
    },
    "expand": {"coefficient": lambda: torch.ones(2), "like": _state},
    "LearnedUncertainty": {"features": lambda: 8},
    "LearnedUncertainty.forward": {"self": lambda: dk.LearnedUncertainty(features=8)},
    "LearnedUncertainty.log_variance": {"self": lambda: dk.LearnedUncertainty(features=8)},
    "load_checkpoint": {"model": lambda: nn.Linear(2, 2)},
    "read_checkpoint": {},
    "save_checkpoint": {
        "model": lambda: nn.Linear(2, 2),
        "path": lambda: _folder() / "written.pt",
        "step": lambda: 3,
    },
    "reconstruct_ema": {"snapshots": _snapshots},
    "slerp": {"a": _state, "b": lambda: _state() + 1, "weight": lambda: 0.5},
    "suggest_sigma_max": {},
    "train_noise_classifier": {
        "classifier": lambda: dk.NoiseClassifier(networks.MLP(2, out_features=2), dk.VPSDE()),
        "class_labels": lambda: torch.tensor([0, 1, 0, 1]),
        "steps": lambda: 1,
    },
    "variance_minimizing_backward": {
        "loss": lambda: torch.ones(2),
        "diffusion": lambda: torch.ones(2),
        "interior": lambda: [],
    },
    "save_network": {
        "path": lambda: _folder() / "network.pt",
        "network": lambda: networks.MLP(2, width=4),
    },
    "save_model": {
        "path": lambda: _folder() / "written.safetensors",
        "model": lambda: dk.EpsModel(networks.MLP(2, width=4), dk.VPSDE()),
    },
    "load_model": {"path": lambda: _folder() / "model.safetensors"},
    "register_part": {"part": lambda: dk.TimeLabel},
    "AveragePool": {"factor": lambda: 2},
    "Blur": {"kernel": lambda: torch.ones(3, 3) / 9, "size": lambda: (4, 4)},
    "Mask": {"mask": lambda: torch.ones(2)},
    "Matrix": {"rows": lambda: torch.eye(2)},
    "check_operator": {"operator": lambda: control.Matrix(torch.eye(2)), "data": _state},
    "dsm_variance": {"samples": lambda: 10},
    "stf_variance": {"samples": lambda: 10},
    "posterior_divergence": {"samples": lambda: 10},
    "gradient_variance": {
        "model": lambda: dk.EpsModel(networks.MLP(2, width=4), dk.VPSDE()),
        "objective": dk.ScoreMatching,
        "batch_size": lambda: 2,
        "pairs": lambda: 2,
    },
    "plot_variances": {"results": _estimate},
    "all_gather": {"result": lambda: torch.ones(2)},
    "extract_features": {"images": lambda: _state(4, 3, 4, 4), "extractor": _flatten},
    "gather_features": {"data": lambda: _state(4, 3, 4, 4), "extractor": _flatten},
    "stream_features": {"data": lambda: _state(4, 3, 4, 4), "extractor": _flatten},
    "features": {"name": lambda: "pixels"},
    "register_features": {"name": lambda: "flat", "factory": lambda: _flatten},
    "save_statistics": {
        "path": lambda: _folder() / "written.npz",
        "moments": _moments,
    },
    "load_statistics": {"path": lambda: _folder() / "statistics.npz"},
    "nearest": {"queries": lambda: _state(3, 2)},
    "held_out_loss": {"objective": dk.ScoreMatching, "data": lambda: _state(4, 2)},
    "load_shards": {"directory": lambda: _folder() / "shards"},
    "sample_to_shards": {
        "draw": lambda: _draw,
        "count": lambda: 2,
        "directory": lambda: Path(tempfile.mkdtemp(dir=_folder())),
    },
    "to_uint8": {"x": lambda: _state(2, 3, 4, 4)},
    "frechet_distance": {},
    "MLP": {"features": lambda: 2, "width": lambda: 4},
    "ADMUNet": {**TINY, "heads": lambda: 1},
    "EDM2UNet": {**TINY, "head_channels": lambda: 8},
    "DDPMUNet": {**TINY},
    "DDPMpp": {**TINY},
    "NCSNpp": {**TINY},
    "DiT": {"width": lambda: 12, "depth": lambda: 1, "heads": lambda: 2},
    "NCSNv2": {
        "sigmas": lambda: (2.0, 1.0),
        "width": lambda: 8,
        "levels": lambda: ((1, 1), (2, 1)),
    },
    "FourierFeatures": {"network": lambda: networks.MLP(2), "exponents": lambda: (6, 7)},
    "PositionChannels": {"network": lambda: networks.MLP(2), "frequencies": lambda: (1,)},
    "PatchedModel": {"patch": lambda: 4, "overlap": lambda: 2},
    "PatchedModel.predict": {
        "self": lambda: dk.PatchedModel(_model(), 4, 2),
        "x": lambda: _state(2, 3, 8),
    },
    "random_crops": {"x0": lambda: _state(2, 3, 8, 8), "size": lambda: 4},
    "Crops.cut": {
        "self": lambda: dk.random_crops(_state(2, 3, 8, 8), 4),
        "others": lambda: _state(2, 1, 8, 8),
    },
    "fir_conv_downsample": _IMAGE,
    "fir_conv_upsample": _IMAGE,
    "fir_downsample": _IMAGE,
    "fir_upsample": _IMAGE,
    "upfirdn": _IMAGE,
    "check_score_model": {"shape": lambda: (2,)},
    "power_coefficients": {
        "snapshots": lambda: [(10, 0.1), (20, 0.1)],
        "wanted": lambda: (20, 0.08),
    },
    "EndlessBatches": {"data": _image_data, "batch_size": lambda: 2, "start": lambda: 0},
    "ImageTensors": {
        "images": _bytes,
        "class_labels": lambda: torch.tensor([0, 1]),
        "classes": lambda: ["a", "b"],
    },
    "save_grid": {"path": lambda: _folder() / "grid.png", "images": _bytes},
    "save_images": {"path": lambda: Path(tempfile.mkdtemp(dir=_folder())), "images": _bytes},
    "open_images": {"path": lambda: _folder() / "images.npz"},
    # methods
    "EDMAugmentation.__call__": {"self": image_data.EDMAugmentation, **_IMAGE},
    "EndlessBatches.items": {
        "self": lambda: image_data.EndlessBatches(_image_data(), 2),
        "positions": lambda: torch.tensor([0, 5]),
    },
    "ImageTensors.check": {"self": _image_data},
    "EMA.update": {"self": _made(dk.EMA, nn.Linear(2, 2)), "model": lambda: nn.Linear(2, 2)},
    "PowerEMA.update": {
        "self": _made(dk.PowerEMA, nn.Linear(2, 2)),
        "model": lambda: nn.Linear(2, 2),
    },
    "NELBO.__call__": {"self": lambda: dk.NELBO(_model())},
    "ODELikelihood.__call__": {"self": lambda: dk.ODELikelihood(_model(), rtol=0.1, atol=0.1)},
    "ChainNELBO.__call__": {"self": lambda: dk.ChainNELBO(_chain_model())},
    "DiscreteNELBO.__call__": {
        "self": lambda: dk.DiscreteNELBO(dk.EpsModel(_network, dk.LogSNRSDE())),
    },
    "PCSampler.__call__": {"self": lambda: dk.PCSampler(_model(), dk.Euler(), steps=2)},
    "PCSampler.edit": {
        "self": lambda: dk.PCSampler(_model(), dk.Euler(), steps=2),
        "t": lambda: 0.9,
    },
    "ProbabilityFlow.sample": {"self": lambda: dk.ProbabilityFlow(_model(), rtol=0.1, atol=0.1)},
    "ProbabilityFlow.encode": {"self": lambda: dk.ProbabilityFlow(_model(), rtol=0.1, atol=0.1)},
    "ProbabilityFlow.decode": {
        "self": lambda: dk.ProbabilityFlow(_model(), rtol=0.1, atol=0.1),
        "z": _state,
    },
    "ProbabilityFlow.interpolate": {
        "self": lambda: dk.ProbabilityFlow(_model(), rtol=0.1, atol=0.1),
        "steps": lambda: 2,
    },
    "ScoreMatching.__call__": {"self": dk.ScoreMatching},
    "ScoreMatching.nats": {"self": lambda: dk.ScoreMatching(dk.LikelihoodWeighting())},
    "ForwardSDE.perturb": {"self": dk.VPSDE},
    "ForwardSDE.perturbation_kernel": {"self": dk.VPSDE},
    "ForwardSDE.drift": {"self": dk.VPSDE},
    "ForwardSDE.prior_sample": {"self": dk.VPSDE},
    "ForwardSDE.prior_log_prob": {"self": dk.VPSDE},
    "NetworkModel.predict": {"self": _model},
    "ScoreModel.forward": {"self": _model},
    "EmpiricalModel.predict": {"self": lambda: dk.EmpiricalModel(dk.VPSDE(), _state())},
    "GaussianMixtureModel.predict": {
        "self": lambda: dk.GaussianMixtureModel(dk.VPSDE(), [[-1.0, 0.0]], [0.1]),
    },
    "GaussianMixtureModel.log_prob": {
        "self": lambda: dk.GaussianMixtureModel(dk.VPSDE(), [[-1.0, 0.0]], [0.1]),
    },
    "GaussianMixtureModel.sample": {
        "self": lambda: dk.GaussianMixtureModel(dk.VPSDE(), [[-1.0, 0.0]], [0.1]),
    },
    "NoiseClassifier.forward": {
        "self": lambda: dk.NoiseClassifier(lambda x, noise_label: x, dk.VPSDE()),
    },
    "Levels.check": {"self": dk.decoders.Levels},
    "Levels.encode": {"self": dk.decoders.Levels},
    "Levels.decode": {"self": dk.decoders.Levels},
    "GaussianDecoder.encode": {"self": dk.GaussianDecoder},
    "GaussianDecoder.check": {
        "self": dk.GaussianDecoder,
        "x": lambda: dk.GaussianDecoder().encode(_images()),
    },
    "GaussianDecoder.log_prob": {
        "self": dk.GaussianDecoder,
        "mean": _state,
        "log_var": _state,
    },
    "LevelDecoder.log_prob": {
        "self": dk.LevelDecoder,
        "z": lambda: _state(2, 3, 4, 4),
    },
    "Dequantizer.forward": {"self": dk.UniformDequantizer},
    "Dequantizer.quantize": {"self": dk.UniformDequantizer, "x": lambda: _state().clamp(-1, 1)},
    "LossSecondMomentTimes.update": {"self": dk.LossSecondMomentTimes},
    "LossSecondMomentTimes.load_state_dict": {
        "self": dk.LossSecondMomentTimes,
        "state": lambda: dk.LossSecondMomentTimes().state_dict(),
    },
    "EMA.load_state_dict": {
        "self": _made(dk.EMA, nn.Linear(2, 2)),
        "state_dict": lambda: dk.EMA(nn.Linear(2, 2)).state_dict(),
    },
    "PowerEMA.load_state_dict": {
        "self": _made(dk.PowerEMA, nn.Linear(2, 2)),
        "state_dict": lambda: dk.PowerEMA(nn.Linear(2, 2)).state_dict(),
    },
    "PowerEMA.save": {
        "self": _updated,
        "folder": lambda: Path(tempfile.mkdtemp(dir=_folder())),
    },
    "FeatureMoments.update": {"self": metrics.FeatureMoments, "features": lambda: _state(4, 2)},
    "FeatureMoments.merge": {"self": metrics.FeatureMoments, "other": metrics.FeatureMoments},
    "FeatureMoments.load_state_dict": {
        "self": metrics.FeatureMoments,
        "state": lambda: metrics.FeatureMoments().state_dict(),
    },
    **{
        name: {"ensemble": lambda: _state(4, 3, 2), "observation": lambda: _state(4, 2)}
        for name in ("crps", "energy_score", "spread_skill", "rank_histogram", "observation_ranks")
    },
    **{
        name: {"samples": lambda: _state(4, 3, 2), "truth": lambda: _state(4, 2)}
        for name in ("expected_coverage", "simulation_based_calibration")
    },
    "EnsembleScores.update": {
        "self": calibration.EnsembleScores,
        "ensemble": lambda: _state(4, 3, 2),
        "observation": lambda: _state(4, 2),
    },
    "EnsembleScores.merge": {
        "self": calibration.EnsembleScores,
        "other": calibration.EnsembleScores,
    },
    "plot_coverage": {
        "results": lambda: calibration.expected_coverage(_state(4, 3, 2), _state(4, 2))
    },
    "plot_rank_histogram": {
        "result": lambda: calibration.rank_histogram(_state(4, 3, 2), _state(4, 2))
    },
    "InceptionScore.update": {
        "self": metrics.InceptionScore,
        "probs": lambda: _state(4, 3).softmax(1),
    },
    "InceptionScore.merge": {"self": metrics.InceptionScore, "other": metrics.InceptionScore},
    "InceptionScore.load_state_dict": {
        "self": metrics.InceptionScore,
        "state": lambda: metrics.InceptionScore().state_dict(),
    },
    "ReferenceBatches.set_epoch": {
        "self": lambda: dk.ReferenceBatches([torch.ones(2)] * 8, 2, 4),
        "epoch": lambda: 1,
    },
    "ReferenceBatches.load_state_dict": {
        "self": lambda: dk.ReferenceBatches([torch.ones(2)] * 8, 2, 4),
        "state": lambda: dk.ReferenceBatches([torch.ones(2)] * 8, 2, 4).state_dict(),
    },
    "Chain.time": {"self": lambda: dk.DDPMChain.linear(25), "step": lambda: 2},
    "Chain.step": {"self": lambda: dk.DDPMChain.linear(25)},
    "Chain.subsequence": {"self": lambda: dk.DDPMChain.linear(25), "spec": lambda: 2},
    "Chain.respaced": {"self": lambda: dk.DDPMChain.linear(25), "spec": lambda: 2},
    "TimeTravel.steps": {"self": dk.TimeTravel, "first": lambda: 0, "last": lambda: 3},
    "AnalyticFirstStep": {"predictor": dk.DDIM, "x0": lambda: 0.5},
    "Restart": {"s_min": lambda: 0.1, "s_max": lambda: 0.9, "steps": lambda: 2},
    "Restart.place": {
        "self": lambda: dk.Restart(0.1, 0.9),
        "grid": lambda: dk.LogSNRGrid()(dk.VPSDE(), 9),
    },
    "FittedGrid": {
        "times": lambda: (1.0, 0.5, 0.1),
        "alpha": lambda: (0.1, 0.5, 0.9),
        "sigma": lambda: (0.9, 0.5, 0.1),
        "process": lambda: "VPSDE()",
        "predictor": lambda: "DDIM()",
        "nfe": lambda: 2,
        "error": lambda: 0.1,
        "fixed_error": lambda: 0.2,
    },
    "FittedGrid.__call__": {"self": lambda: _fitted_grid(), "steps": lambda: 2},
    "FittedGrid.save": {
        "self": lambda: _fitted_grid(),
        "path": lambda: _folder() / "grid.json",
    },
    "FittedGrid.load": {"self": lambda: _fitted_grid(), "path": lambda: _folder() / "grid.json"},
    "fit_grid": {
        "predictor": dk.DDIM,
        "start": lambda: (4, 2),
        "steps": lambda: 2,
        "iterations": lambda: 0,
        "tolerance": lambda: 1e-2,
    },
    "Mask.__call__": {"self": _made(control.Mask, torch.ones(2))},
    "Mask.inverse": {"self": _made(control.Mask, torch.ones(2))},
    "Matrix.__call__": {"self": _made(control.Matrix, torch.eye(2))},
    "Matrix.inverse": {"self": _made(control.Matrix, torch.eye(2))},
    "Gray.__call__": {"self": control.Gray, "x": lambda: _state(2, 3, 4, 4)},
    "Gray.inverse": {"self": control.Gray, "y": lambda: _state(2, 1, 4, 4)},
    "AveragePool.__call__": {
        "self": _made(control.AveragePool, 2),
        "x": lambda: _state(2, 3, 4, 4),
    },
    "AveragePool.inverse": {"self": _made(control.AveragePool, 2), "y": lambda: _state(2, 3, 2, 2)},
    "Blur.__call__": {
        "self": lambda: control.Blur(torch.ones(3, 3) / 9, (4, 4)),
        "x": lambda: _state(2, 3, 4, 4),
    },
    "Blur.inverse": {
        "self": lambda: control.Blur(torch.ones(3, 3) / 9, (4, 4)),
        "y": lambda: _state(2, 3, 4, 4),
    },
    "MLP.forward": {
        "self": lambda: networks.MLP(2, width=4),
        "noise_label": lambda: torch.ones(2),
        "class_labels": lambda: None,
    },
    "DiT.forward": {
        "self": lambda: networks.DiT(3, width=12, depth=1, heads=2),
        "x": lambda: _state(2, 3, 8, 8),
        "noise_label": lambda: torch.ones(2),
        "class_labels": lambda: None,
    },
    "NCSNv2.forward": {
        "self": lambda: networks.NCSNv2(sigmas=(2.0, 1.0), width=8, levels=((1, 1), (2, 1))),
        "x": lambda: _state(2, 3, 8, 8),
        "noise_label": lambda: torch.zeros(2),
        "class_labels": lambda: None,
    },
    "UNet.forward": {
        "self": lambda: networks.NCSNpp(**{name: value() for name, value in TINY.items()}),
        "x": lambda: _state(2, 3, 8, 8),
        "noise_label": lambda: torch.ones(2),
        "class_labels": lambda: None,
    },
    "FourierFeatures.forward": {
        "self": lambda: networks.FourierFeatures(networks.MLP(10, width=4), exponents=(1, 2)),
        "noise_label": lambda: torch.ones(2),
    },
    "UniformGrid.__call__": {"self": dk.UniformGrid},
    "KarrasGrid.__call__": {"self": dk.KarrasGrid},
    "LogSNRGrid.__call__": {"self": dk.LogSNRGrid},
    "QuadraticGrid.__call__": {"self": dk.QuadraticGrid},
    "ShiftedGrid": {"shift": lambda: 3.0, "grid": dk.UniformGrid},
    "ShiftedGrid.__call__": {"self": _made(dk.ShiftedGrid, 3.0)},
    "ShiftedTimes": {"shift": lambda: 3.0, "times": dk.UniformTimes},
    "ShiftedTimes.sample": {"self": _made(dk.ShiftedTimes, 3.0)},
    "AYSGrid.__call__": {"self": dk.AYSGrid},
    "TangentGrid.__call__": {"self": dk.TangentGrid},
    "ChainGrid.__call__": {"self": lambda: dk.ChainGrid(dk.DDPMChain.linear(50))},
}
for _times in (
    "UniformTimes", "StratifiedTimes", "LogNormalTimes", "LogitNormalTimes", "ModeTimes",
    "ImportanceTimes",
):  # fmt: skip
    OWN[f"{_times}.sample"] = {"self": getattr(dk, _times)}
OWN["DiscreteTimes.sample"] = {"self": dk.DiscreteTimes, "sde": lambda: dk.DDPMChain.linear(25)}
OWN["LossSecondMomentTimes.sample"] = OWN["DiscreteTimes.sample"] | {
    "self": dk.LossSecondMomentTimes
}

# Values made by the library, classes to subclass, and what takes no argument of its own.
_RESULTS = {
    "Batch",
    "EnsembleResult",
    "ExpectedCoverage",
    "ImageFiles",
    "Perturbed",
    "Prediction",
    "Step",
    "Estimate",
    "BitsPerDim",
    "BitsPerStep",
    "Bound",
    "ChainBound",
    "Dequantized",
    "DiscreteBound",
    "ODELogLikelihood",
    "FeatureStatistics",
    "HeldOutLoss",
    "InceptionScoreResult",
    "KernelDistance",
    "Nearest",
    "PrecisionRecall",
    "RankHistogram",
    "SBCResult",
    "SampleQuality",
    "SamplerState",
    "SpreadSkill",
    "StageCoefficients",
    "StepCoefficients",
    "Report",
    "Checkpoint",
    "Crops",
    "StepReport",
}
# `as_denoiser` and `to_diffusers` make them: classes without arguments of their own.
_MADE = {"SigmaDenoiser", "UNetAdapter"}
# Files have tests of their own; `expand` runs in every step.
_ELSEWHERE = {
    "load_diffusers",
    "load_dit",
    "load_edm",
    "load_edm2",
    "load_improved_diffusion",
    "load_network",
    "load_score_sde",
    "load_sit",
    "push_to_hub",
    "from_pretrained",
    "inception_features",
    "seeded",  # takes any number of integers
    "variance_minimizing_backward",
    "expand",
    "all_gather",
}


def names() -> list[str]:
    """Return the callables to test: every one, and the methods with a recipe."""
    found = callables()
    plain = [
        name for name in found if "." not in name and name not in _RESULTS | _ELSEWHERE | _MADE
    ]
    return plain + [name for name in OWN if "self" in OWN[name]]


def target(name: str) -> Any:
    """Return the callable, bound to an object if it is a method."""
    own = OWN.get(name, {})
    return getattr(own["self"](), name.split(".")[1]) if "self" in own else callables()[name]


_REST = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@functools.cache
def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a callable."""
    known = callables()
    listed = inspect.signature(known[name] if name in known else target(name)).parameters
    return {n: p for n, p in listed.items() if n != "self" and p.kind not in _REST}


def call(name: str, replaced: Recipe) -> Any:
    """Call with valid arguments, some of them replaced."""
    own, positional, named = OWN.get(name, {}), [], {}
    for parameter, p in parameters(name).items():
        default = p.default is not inspect.Parameter.empty
        if parameter in replaced or parameter in own or not default:
            make = replaced.get(parameter) or own.get(parameter) or COMMON[parameter]
            if p.kind is p.POSITIONAL_ONLY:
                positional.append(make())
            else:
                named[parameter] = make()
    if own.keys() >= TINY.keys():  # sizes are passed on by networks that do not name them
        named |= {n: make() for n, make in TINY.items() if n not in named}
    result = target(name)(*positional, **named)
    return list(result) if inspect.isgenerator(result) else result


# The values that a kind of parameter takes, by a word of its annotation.
_TAKEN = {
    "None": ["None"],
    "bool": ["True"],
    "Progress": ["True"],
    "int": ["0"],
    "float": ["0", "0.5", "-1", "10**30", "-10**30"],
    "str": ["a word", "an empty string", "an unknown device"],
    "PathLike": ["a word", "an empty string", "an unknown device", "a path", "bytes"],
    "Path": ["a word", "an empty string", "an unknown device", "a path"],
    "Module": ["a layer"],
    "Model_co": ["a layer"],
    "Mapping": ["an empty dictionary"],
    "Generators": ["None"],
    "Gaussian": ["a column", "three numbers"],
    # On the meta device tensors have shapes only, and code that reads no value runs.
    "Tensor": [
        "a meta tensor",
        "a column",
        "three numbers",
        "integers",
        "booleans",
        "a numpy array",
    ],
    "Sequence": ["a numpy array"],
    "SigmaData": ["0.5", "10**30", "a column", "three numbers", "a numpy array"],
    "Any": list(BAD),
}
_CALLED = ("Callable", "Decay", "Label", "Grid", "Linear", "Progress", "Projection", "Classifier")
_FILES = ("PathLike", "Path")

# What is taken on purpose beyond this, with the reason.
ALLOWED: dict[tuple[str, str], list[str]] = {
    ("AdaptiveProjection", "max_norm"): ["infinity", "10**400"],  # no bound
    ("AnalyticFirstStep", "x0"): ["a scalar tensor"],  # one mean for all pixels
    ("Autoguidance", "conditions"): ["an empty list", "an empty tuple", "a pair of words"],
    ("Chain.time", "step"): ["a numpy integer"],
    # One mean or log-variance for all pixels.
    ("GaussianDecoder.log_prob", "mean"): ["a scalar tensor"],
    ("GaussianDecoder.log_prob", "log_var"): ["a scalar tensor"],
    ("ImageTensors", "classes"): ["a pair of words"],
    ("fit_grid", "grids"): ["an empty list", "an empty tuple"],  # none but the fixed ones
    **{("FittedGrid", name): ["a word", "an empty string"] for name in ("process", "predictor")},
    ("broadcast_object", "value"): list(BAD),
    ("gathered_weights", "model"): list(BAD),  # refused when the block is entered
    ("evaluate_bits_per_dim", "data"): ["a reversed pair"],  # two items
    ("held_out_loss", "data"): ["a reversed pair"],
    # Metrics refuse features that are not finite.
    **{(name, "data"): ["a tensor of NaN", "two NaN", "a reversed pair", "a pair with NaN"]
       for name in ("gather_features", "stream_features")},
    ("slerp", "weight"): ["a scalar tensor"],
    ("bits_per_dim", "nats"): ["a scalar tensor", "an empty tensor"],  # of any shape
    ("Clip", "low"): ["-infinity"],  # open to one side
    ("Clip", "high"): ["infinity", "10**400"],
    ("DynamicThreshold", "largest"): ["infinity"],  # no limit
    # One for all samples.
    ("SigmaDenoiser.forward", "sigma"): ["a scalar tensor"],
    ("UNetAdapter.forward", "timestep"): ["a scalar tensor"],
    ("UNetAdapter.forward", "class_labels"): list(BAD),  # passed on to the network
    ("Heun", "s_min"): ["infinity"],  # never churn
    ("Heun", "s_max"): ["infinity"],
    ("SASolver", "s_min"): ["infinity"],
    ("SASolver", "s_max"): ["infinity"],
    **{(net, "attention_levels"): ["an empty list", "an empty tuple"]  # no attention
       for net in ("ADMUNet", "EDM2UNet", "NCSNpp")},
    ("PositionChannels", "frequencies"): ["an empty list", "an empty tuple"],  # coordinates alone
    # Files hold numbers of numpy.
    **{(net, "dropout"): ["a numpy number"] for net in ("ADMUNet", "EDM2UNet", "NCSNpp")},
    ("rand", "shape"): ["an empty list", "an empty tuple"],  # one number
    ("randn", "shape"): ["an empty list", "an empty tuple"],
    ("randn_like", "x"): ["a scalar tensor", "an empty tensor", "a tensor of NaN", "two NaN"],
    ("step_noise", "x"): ["a scalar tensor", "an empty tensor", "a tensor of NaN", "two NaN"],
    ("step_noise", "t"): list(BAD),  # read by a path only
    ("step_noise", "s"): list(BAD),
    ("Chain.step", "t"): ["an empty tensor"],
    ("LearnedUncertainty.log_variance", "t"): ["an empty tensor"],  # of no samples
    # Passed on to the target; most do not use it.
    ("ScoreMatching.__call__", "reference_class_labels"): list(BAD),
    ("ScoreMatching.nats", "reference_class_labels"): list(BAD),
    ("upfirdn", "kernel"): ["a reversed pair"],  # taps of sum 0 are a filter too
    ("clipped_step", "max_norm"): ["infinity"],  # only skip bad gradients
    ("drop_conditions", "null"): ["NaN", "infinity", "-infinity", "a tensor of NaN", "two NaN",
                                  "a scalar tensor", "complex numbers"],
    ("drop_conditions", "condition"): ["a tensor of NaN", "two NaN", "an empty tensor",
                                       "complex numbers"],
}  # fmt: skip


def problem(name: str, parameter: str, bad: str) -> str | None:
    """Return what is wrong with the answer to a bad value, or None."""
    kind = str(parameters(name)[parameter].annotation)
    words = set(re.findall(r"\w+", kind))
    called = any(word in words for word in _CALLED) and bad in ("a class", "a function", "a layer")
    taken = {value for word in words for value in _TAKEN.get(word, [])}
    taken |= {*ALLOWED.get((name, parameter), [])}
    if "Tensor" in words and "." in name:  # what a model makes of a NaN, a sampler refuses
        taken |= {"a tensor of NaN", "two NaN"}
    try:
        call(name, {parameter: BAD[bad]})
    except (ValueError, TypeError, dk.CheckpointError) as error:
        told = "expected" in str(error) or parameter in str(error)
        return None if told or called else f"{type(error).__name__}: {error}"
    except OSError as error:
        return None if words & {*_FILES} else f"{type(error).__name__}: {error}"
    except Exception as error:
        return None if called else f"{type(error).__name__}: {error}"
    return None if called or bad in taken else "accepted"
