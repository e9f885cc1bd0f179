"""States of every optimizer of torch: resumed exactly, matched by name, refused if wrong."""

import copy
import math

import pytest
import torch
from support.nested import same
from support.older_checkpoints import as_version
from torch import nn

from diffusionkit import CheckpointError, load_checkpoint, save_checkpoint
from diffusionkit.training import checkpointing
from diffusionkit.training.checkpointing import VERSION

MAKES = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "Adam, differentiable": lambda p: torch.optim.Adam(p, 0.01, differentiable=False),
    "Adam, tensor lr": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4),
}
if hasattr(torch.optim, "Muon"):
    MAKES["Muon"] = lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], 0.01)


class Layers(nn.Module):
    """Two layers of one shape, registered in either order."""

    def __init__(self, *, swapped: bool = False, half: bool = False) -> None:
        super().__init__()
        for name in ("b", "a") if swapped else ("a", "b"):
            setattr(self, name, nn.Linear(3, 3))
        self.to(torch.bfloat16 if half else torch.float32)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def seeded(**options) -> Layers:
    """Layers whose weights depend on their names only."""
    model = Layers(**options)
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return model


def train(model, optimizer, steps: int) -> None:
    x = torch.linspace(-1, 1, 12, dtype=next(model.parameters()).dtype).view(4, 3)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.flip(0)).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def state_of(model, optimizer):
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


# LBFGS of torch 2.8 warns of its own conversion.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKES)
def test_every_optimizer_resumes_bit_for_bit(tmp_path, name, half) -> None:
    model = seeded(half=half)
    optimizer = MAKES[name](model.parameters())
    train(model, optimizer, 3)
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    other = Layers(half=half)
    resumed = MAKES[name](other.parameters())
    load_checkpoint(tmp_path / "run.pt", other, optimizer=resumed)
    assert same(state_of(other, resumed), state_of(model, optimizer))
    train(model, optimizer, 3)
    train(other, resumed, 3)
    assert same(state_of(other, resumed), state_of(model, optimizer))


@pytest.mark.parametrize("name", MAKES)
def test_layers_in_another_order_keep_their_moments_or_are_refused(tmp_path, name) -> None:
    model = seeded()
    optimizer = MAKES[name](model.parameters())
    train(model, optimizer, 3)
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    other = seeded(swapped=True)
    resumed = MAKES[name](other.parameters())
    before = state_of(other, resumed)
    if name == "LBFGS":
        with pytest.raises(CheckpointError, match="the order of the file, on which LBFGS depends"):
            load_checkpoint(tmp_path / "run.pt", other, optimizer=resumed)
        assert same(state_of(other, resumed), before)
        return
    load_checkpoint(tmp_path / "run.pt", other, optimizer=resumed)
    for n, p in model.named_parameters():
        mine = dict(other.named_parameters())[n]
        assert torch.equal(mine, p)
        assert same(dict(resumed.state[mine]), dict(optimizer.state[p]))
    train(model, optimizer, 3)
    train(other, resumed, 3)
    for n, p in model.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[n], p)


def test_sparse_moments_and_groups_are_matched_by_name(tmp_path) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    other = nn.Embedding(5, 2, sparse=True)
    resumed = torch.optim.SparseAdam(other.parameters())
    load_checkpoint(tmp_path / "run.pt", other, optimizer=resumed)
    assert same(state_of(other, resumed), state_of(model, optimizer))
    # Groups: a parameter in another group has another learning rate.
    model, other = seeded(), seeded()
    groups = lambda m, first, last: [  # noqa: E731
        {"params": list(getattr(m, first).parameters()), "lr": 0.1},
        {"params": list(getattr(m, last).parameters())},
    ]
    optimizer = torch.optim.Adam(groups(model, "a", "b"))
    train(model, optimizer, 1)
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    resumed = torch.optim.Adam(groups(other, "b", "a"))
    match = r"optimizer: group 0: expected moments of \['b.weight', 'b.bias'\], got those of \['a"
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path / "run.pt", other, optimizer=resumed)
    # Parameters without a name, of no module that the checkpoint holds, are matched by place.
    free = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.Adam([*model.parameters(), *free])
    free[0].sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    load_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    resumed = torch.optim.Adam([*model.parameters(), *reversed(free)])
    with pytest.raises(CheckpointError, match=r"exp_avg of \(unnamed 0\): expected shape \(3,\)"):
        load_checkpoint(tmp_path / "run.pt", model, optimizer=resumed)


def content(tmp_path, name: str):
    model = seeded()
    optimizer = MAKES[name](model.parameters())
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    return model, optimizer, torch.load(tmp_path / "run.pt", weights_only=True)


def refused(monkeypatch, model, optimizer, changed, match: str) -> None:
    monkeypatch.setattr(checkpointing, "read_torch", lambda *_, **__: changed)
    before = state_of(model, optimizer)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint("run.pt", model, optimizer=optimizer)
    assert same(state_of(model, optimizer), before)


@pytest.mark.parametrize("version", [1, VERSION])
@pytest.mark.parametrize("name", MAKES)
def test_wrong_moments_are_refused_by_name(tmp_path, monkeypatch, name, version) -> None:
    """Also in files of version 1, which do not list the entries that they have."""
    model, optimizer, good = content(tmp_path, name)
    good = good if version == VERSION else as_version(version, good)
    state = good["optimizer"]["state"]
    for number in [*state][:: max(1, len(state) - 1)]:
        for key, value in state[number].items():
            if not isinstance(value, torch.Tensor):
                continue
            wrong = [value.unsqueeze(0).expand(7, *value.shape).clone(), value + math.nan]
            if value.numel() > 1 and name != "LBFGS":
                wrong += [value.view(-1)[1:], value.bool(), value.to(torch.float8_e5m2), 1.5]
            if key in ("step", "exp_avg_sq", "square_avg", "sum", "exp_inf", "row_var"):
                wrong += [-1 - value.abs()]
            for change in wrong:
                changed = copy.deepcopy(good)
                changed["optimizer"]["state"][number][key] = change
                refused(monkeypatch, model, optimizer, changed, rf"optimizer: {key} of .*expected")


@pytest.mark.parametrize("name", MAKES)
def test_wrong_options_are_refused_by_name(tmp_path, monkeypatch, name) -> None:
    model, optimizer, good = content(tmp_path, name)
    for key, value in good["optimizer"]["param_groups"][0].items():
        wrong = []
        if isinstance(value, bool):
            how = ("foreach", "fused", "capturable", "differentiable")
            wrong = [not value] if key not in how else []
        elif isinstance(value, (int, float)):
            wrong = [math.nan, math.inf, "x", None, [value], True]
            wrong += [-1 - value] if value >= 0 else []
        elif isinstance(value, torch.Tensor):
            wrong = [torch.tensor(math.nan), -value, torch.ones(2)]
        elif key == "betas":
            wrong = [(0.9,), (0.9, math.nan), (0.9, -0.1), (0.9, 1.0), 0.9, None]
        for change in wrong:
            changed = copy.deepcopy(good)
            changed["optimizer"]["param_groups"][0][key] = change
            refused(monkeypatch, model, optimizer, changed, rf"optimizer: group 0: {key}")
    changed = copy.deepcopy(good)
    del changed["optimizer"]["param_groups"][0]["lr"]
    refused(monkeypatch, model, optimizer, changed, "optimizer: group 0: expected lr, got none")


def test_implementation_of_a_step_is_that_of_the_running_optimizer(tmp_path) -> None:
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    resumed = torch.optim.Adam(model.parameters(), foreach=True)
    load_checkpoint(tmp_path / "run.pt", model, optimizer=resumed)
    assert resumed.param_groups[0]["foreach"] is True
    assert resumed.param_groups[0]["fused"] is None
    train(model, resumed, 1)


def test_moments_that_no_load_would_take_are_not_saved(tmp_path) -> None:
    model = seeded()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    old = (tmp_path / "run.pt").read_bytes()
    entry = optimizer.state[model.b.weight]
    for change, match in (
        ({"exp_avg": torch.ones(4)}, r"exp_avg of b\.weight: expected shape \(3, 3\), got \(4,\)"),
        ({"exp_avg": entry["exp_avg"] * math.inf}, r"exp_avg of b\.weight: expected finite"),
        ({"exp_avg_sq": -entry["exp_avg_sq"]}, r"exp_avg_sq of b\.weight: expected numbers >= 0"),
        ({"step": torch.tensor(-1.0)}, r"step of b\.weight: expected numbers >= 0"),
    ):
        optimizer.state[model.b.weight] = {**entry, **change}
        with pytest.raises(ValueError, match=f"optimizer: {match}"):
            save_checkpoint(tmp_path / "run.pt", model, optimizer=optimizer)
    assert (tmp_path / "run.pt").read_bytes() == old
