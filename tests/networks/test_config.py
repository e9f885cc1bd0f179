"""Networks are rebuilt from their recorded arguments."""

import json
from typing import Any

import pytest
import torch
from support.published_networks import PUBLISHED, built
from support.tiny_networks import FAMILIES, arguments, tiny
from torch import nn

from diffusionkit.networks import MLP
from diffusionkit.networks.config import remembers


class Inner(nn.Module):
    @remembers
    def __init__(self, a: int, b: str = "b", *, c: float = 0.5, d: int = 1) -> None:
        """Explain."""
        assert "config" in self.__dict__
        super().__init__()
        self.seen = (a, b, c, d)


class Outer(Inner):
    @remembers
    def __init__(self, a: int = 7, *, c: float = 2.5, **options: Any) -> None:
        super().__init__(a, c=c, **options)


def test_arguments_are_recorded_in_every_form() -> None:
    assert Inner(1).config == {"a": 1, "b": "b", "c": 0.5, "d": 1}
    assert Inner(1, "x").config == Inner(a=1, b="x").config == {"a": 1, "b": "x", "c": 0.5, "d": 1}
    assert Inner(1, c=3.0).config["c"] == 3.0
    assert Inner(1).seen == (1, "b", 0.5, 1)


def test_outer_arguments_take_precedence_and_options_are_flattened() -> None:
    expected = {"a": 7, "b": "b", "c": 2.5, "d": 1}
    assert Outer().config == expected
    assert Outer(3, d=9).config == expected | {"a": 3, "d": 9}
    assert Outer(c=1.5, b="x").config == expected | {"c": 1.5, "b": "x"}
    assert Outer(3, d=9).seen == (3, "b", 2.5, 9)
    assert Outer(**Outer(3, d=9, b="x").config).seen == (3, "x", 2.5, 9)


def test_the_config_belongs_to_the_outermost_constructor() -> None:
    class Halved(Inner):
        @remembers
        def __init__(self, a: int = 4) -> None:
            super().__init__(a // 2)

    net = Halved(6)
    assert (net.config["a"], net.seen[0]) == (6, 3)


def test_configs_are_not_shared() -> None:
    first, second = Outer(1), Outer(2)
    assert (first.config["a"], second.config["a"]) == (1, 2)


def test_the_constructor_keeps_its_docstring_and_errors() -> None:
    assert Inner.__init__.__doc__ == "Explain."
    takes = r"expected an argument of Inner\(a, b, c, d\), got"
    with pytest.raises(TypeError, match=rf"^a: {takes} none$"):
        Inner()
    with pytest.raises(TypeError, match=rf"^e: {takes} an unknown name"):
        Inner(1, e=2)


def structure(net: nn.Module) -> dict[str, Any]:
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in net.state_dict().items()}
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    return {"tensors": tensors, "trained": trained, "modules": str(net), "config": net.config}


@pytest.mark.parametrize("kind", FAMILIES)
def test_rebuilt_from_config_computes_the_same(kind: str) -> None:
    net = tiny(kind)
    other = type(net)(**net.config).double().eval()
    assert structure(other) == structure(net)
    other.load_state_dict(net.state_dict())
    given = arguments(net)
    assert torch.equal(net(**given), other(**given))


QUICK = ("ncsnpp celeba smld", "ddpmpp edm classes", "ddpm", "improved 256")
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_published_networks_are_rebuilt(name: str) -> None:
    net = built(name)
    with torch.device("meta"):
        other = type(net)(**net.config)
    assert structure(other) == structure(net)


def test_mlp_is_rebuilt() -> None:
    net = MLP(3, depth=2, num_classes=4)
    assert net.config == {
        "features": 3,
        "out_features": None,
        "width": 128,
        "depth": 2,
        "num_classes": 4,
        "condition_features": None,
    }
    assert structure(MLP(**net.config)) == structure(net)


@pytest.mark.parametrize("kind", FAMILIES)
def test_configs_can_be_stored_as_json(kind: str) -> None:
    config = tiny(kind).config
    assert json.loads(json.dumps(config)).keys() == config.keys()
