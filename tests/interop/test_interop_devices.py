"""Adapters on a GPU and on an Apple device: no float64 there, and no waiting in a call."""

import pytest
import torch
from support.pretend_device import PretendDevice

from diffusionkit import EDMSDE, VPSDE, DDPMChain, EDMModel, EpsModel, VModel
from diffusionkit.interop import as_denoiser, from_denoiser, to_diffusers
from diffusionkit.networks import MLP


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("case", ["chain", "continuous", "edm", "denoiser", "back"])
def test_calls_neither_wait_nor_copy(kind, case) -> None:
    network = MLP(3, width=8, depth=1)
    edm = {"sigma_data": 0.5, "prediction_type": "epsilon"}
    with PretendDevice(kind) as device:
        call = {
            "chain": lambda: to_diffusers(EpsModel(network, DDPMChain.cosine(50)), sample_size=1),
            "continuous": lambda: to_diffusers(VModel(network, VPSDE()), sample_size=1),
            "edm": lambda: to_diffusers(EDMModel(network, EDMSDE()), edm, sample_size=1),
            "denoiser": lambda: as_denoiser(EpsModel(network, VPSDE())),
            "back": lambda: as_denoiser(from_denoiser(as_denoiser(EDMModel(network, EDMSDE())))),
        }[case]().to(kind)
        x = torch.rand(4, 3, device=kind)
        values = (1, torch.tensor(1.0), torch.tensor([1]), torch.full((4,), 1.0, device=kind))
        with torch.no_grad():
            call(x, 1)  # tables are copied once
            for value in values:
                with device.watched() as events:
                    call(x, value)
                assert not events, (value, events)
