"""Checkpoints with the layout of released code, weights by formula, and its recorded outputs.

Each case in data/*.json has the names and shapes of a small network of the released code, and
values of its output at `inputs` for the tensors of `weights`. A layout is a list of prefixes with
parts: "enc.0=c" stands for the tensors of part c with the prefix "enc.0.".
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = {
    path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("data/*.json")
}

SCORE_SDE, OPENAI, EDM, EDM2, DIT = (
    DATA[name]["cases"] for name in ("score_sde", "openai", "edm", "edm2", "dit")
)


def shapes(family: str, case: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for item in DATA[family]["cases"][case]["layout"].split():
        prefix, part = item.split("=")
        for name, shape in DATA[family]["parts"][part].items():
            found[f"{prefix}.{name}".strip(".")] = tuple(shape)
    return found


def weights(
    wanted: dict[str, tuple[int, ...]],
    phase: float = 1.0,
    amplitude: float = 0.15,
    chirp: float = 0.013,  # else rows are sine waves, and most of their products vanish
) -> dict[str, Tensor]:
    found = {}
    for name, shape in wanted.items():
        i = np.arange(math.prod(shape), dtype=np.float64)
        angle = phase + 0.37 * i + chirp * i * i + zlib.crc32(name.encode()) % 1000
        # One-dimensional weights belong to normalization layers.
        ones = float(len(shape) == 1 and name.endswith("weight"))
        values = ones + amplitude * np.sin(angle)
        found[name] = torch.from_numpy(values.reshape(shape)).float()
    return found


def inputs(*shape: int) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (1.2 * torch.sin(1.7 * i + 0.003 * i * i)).view(shape).float()


def edm2_tensors(case: str) -> dict[str, Tensor]:
    """Return the tensors of a case of EDM2, whose layers normalize them."""
    return weights(shapes("edm2", case), phase=2.0, amplitude=1.0)


def assert_released(output: Tensor, expected: list[list[float]], tolerance: float = 5e-5) -> None:
    """Compare values of each sample with the recorded ones, relative to their largest magnitude."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    rows = output.detach().double().flatten(1)
    assert len(rows) == len(wanted)
    at = np.linspace(0, rows.shape[1] - 1, wanted.shape[1]).astype(int)
    error = (rows[:, at] - wanted).abs().amax(1) / wanted.abs().amax(1)
    assert float(error.max()) < tolerance, error.tolist()


def score_sde_config(case: str) -> dict[str, Any]:
    """Return the configuration of a case: the base with the changes of the case."""
    data = DATA["score_sde"]
    changes = data["cases"][case]["config"]
    return {section: base | changes.get(section, {}) for section, base in data["base"].items()}


def score_sde_content(case: str, prefix: str = "module.") -> dict[str, Any]:
    """Return the content of a file of score_sde: weights, and averages with another phase."""
    wanted = shapes("score_sde", case)
    model = score_sde_config(case)["model"]
    levels = np.linspace(
        np.log(model["sigma_max"]), np.log(model["sigma_min"]), model["num_scales"]
    )
    state = {"sigmas": torch.tensor(np.exp(levels))} | weights(wanted)
    trained = {name: shape for name, shape in wanted.items() if name != "all_modules.0.W"}
    return {
        # After a warm-up the learning rate is a number of numpy.
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(2e-4), "params": [0]}]},
        "model": {f"{prefix}{name}": tensor for name, tensor in state.items()},
        "ema": {
            "decay": 0.999,
            "num_updates": 3,
            "shadow_params": list(weights(trained, phase=2.0).values()),
        },
        "step": 3,
    }


def score_sde_state(case: str) -> Tensor:
    data = score_sde_config(case)["data"]
    return inputs(2, data["num_channels"], data["image_size"], data["image_size"])


def score_sde_score(model: Any, case: str) -> Tensor:
    with torch.no_grad():
        return model(score_sde_state(case), torch.tensor(SCORE_SDE[case]["t"]))


def dit_weights(case: str, phase: float = 1.0) -> dict[str, Tensor]:
    """Return the tensors of a file of DiT: weights by formula, and the table of positions."""
    wanted = shapes("dit", case)
    _, patches, width = wanted["pos_embed"]
    side, count = math.isqrt(patches), width // 4
    table = np.empty(wanted["pos_embed"])
    for row in range(side):
        for column in range(side):
            for i in range(count):
                for first, place in ((0, column), (2 * count, row)):
                    angle = place / 10000 ** (i / count)
                    table[0, row * side + column, first + i] = math.sin(angle)
                    table[0, row * side + column, first + count + i] = math.cos(angle)
    return weights(wanted, phase) | {"pos_embed": torch.from_numpy(table).float()}


def dit_inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    kwargs = DIT[case]["kwargs"]
    size = kwargs["input_size"]
    x = inputs(3, kwargs["in_channels"], size, size)
    return x, torch.tensor([0.0, 250.0, 999.0]), torch.tensor([1, kwargs["num_classes"], 0])
