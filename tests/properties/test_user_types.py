"""Programs of users under strict mypy: `nox -s types` checks this file, and pytest runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

from diffusionkit import (
    DDIM,
    EDMSDE,
    EMA,
    EDMModel,
    ForwardSDE,
    HalfLife,
    PCSampler,
    PowerEMA,
    ScoreModel,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit.networks import MLP


def build() -> EDMModel:
    return EDMModel(MLP(2), EDMSDE(), sigma_data=0.5)


def test_an_average_has_the_type_of_its_model() -> None:
    model = build()
    ema = EMA(model, decay=HalfLife(images=500_000, batch_size=512, ramp_up=0.05))
    assert_type(ema, EMA[EDMModel])
    assert_type(ema.model, EDMModel)
    assert_type(ema.model.sde, ForwardSDE)
    x = PCSampler(ema.model, DDIM(), steps=2)((1, 2))
    assert_type(x, Tensor)
    with ema.applied(model) as applied:
        assert_type(applied, EDMModel)
    assert_type(ema.updates, int)
    power = PowerEMA(model, sigma_rels=(0.05, 0.10))
    assert_type(power.averages[0.05].model, EDMModel)
    assert ema.model.sigma_data == 0.5


class Trainer(nn.Module):
    """A module that holds an average of any score model."""

    ema: EMA[ScoreModel]

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model
        self.ema = EMA(model)

    def sample(self) -> Tensor:
        return PCSampler(self.ema.model, DDIM(), steps=2)((1, 2))


def average_of(ema: EMA | PowerEMA) -> nn.Module:
    return ema.model if isinstance(ema, EMA) else ema.averages[0.05].model


def test_averages_are_taken_where_any_are(tmp_path: Path) -> None:
    model = build()
    trainer = Trainer(model)
    assert trainer.sample().shape == (1, 2)
    for ema in (EMA(model), PowerEMA(model)):
        save_checkpoint(tmp_path / "run.pt", model, ema=ema)
        load_checkpoint(tmp_path / "run.pt", model, ema=ema)
        assert isinstance(average_of(ema), EDMModel)
    state: dict[str, Tensor] = trainer.state_dict()
    assert torch.equal(state["ema.updates"], torch.tensor(0))
