"""Gradients of networks that are called around their DistributedDataParallel."""

import pytest
from support.processes import run_in_two_processes

PROGRAM = """
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from diffusionkit import NELBO, VPSDE, EpsModel, ScoreMatching
from diffusionkit.networks import MLP

objective, x = ScoreMatching(), torch.full((2, 3), 0.1 * (rank + 1))

def outcome(use):
    try:
        use()
        return "taken"
    except ValueError as error:
        return str(error)

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = EpsModel(MLP(3), VPSDE())

    def forward(self, x):
        return objective(self.model, x).mean()

def quiet(model):
    with torch.no_grad():
        objective(model, x)

network, model, loss = MLP(3), EpsModel(MLP(3), VPSDE()), Loss()
ddp, wrapped, inside = DDP(network), DDP(model), DDP(loss)
result = {
    "bare network": outcome(lambda: objective(EpsModel(ddp.module, VPSDE()), x)),
    "bare model": outcome(lambda: objective(wrapped.module, x)),
    "bare bound": outcome(lambda: NELBO(EpsModel(network, VPSDE()))(x)),
    "around the loss": outcome(lambda: objective(loss.model, x)),
    "network": outcome(lambda: objective(EpsModel(ddp, VPSDE()), x)),
    "loss": outcome(lambda: inside(x).backward()),
    "evaluated": outcome(lambda: quiet(wrapped.module)),
    "alone": outcome(lambda: objective(EpsModel(MLP(3), VPSDE()), x)),
}
del ddp
result["no longer wrapped"] = outcome(lambda: objective(EpsModel(network, VPSDE()), x))
"""


@pytest.mark.slow  # several processes
def test_networks_called_around_their_wrapper_are_refused(tmp_path) -> None:
    for found in run_in_two_processes(PROGRAM, tmp_path):
        for case in ("bare network", "bare model", "bare bound", "around the loss"):
            assert found.pop(case).startswith("model: expected the network in its Distributed"), (
                case
            )
        assert set(found.values()) == {"taken"}, found
