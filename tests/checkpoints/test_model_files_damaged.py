"""Files of whole models that are damaged, foreign, newer or hostile: errors that say why."""

import json
import os
import shutil
import tracemalloc
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.older_checkpoints import as_version
from torch import nn

from diffusionkit import (
    EMA,
    VPSDE,
    CheckpointError,
    DDPMChain,
    EpsModel,
    PowerEMA,
    save_checkpoint,
)
from diffusionkit.checkpoints import load_model, save_model
from diffusionkit.checkpoints._model_builder import built_model
from diffusionkit.networks import MLP


def model(width: int = 4) -> EpsModel:
    torch.manual_seed(0)
    return EpsModel(MLP(2, width=width, depth=1), DDPMChain.linear(25)).eval()


@pytest.fixture
def path(tmp_path):
    """A file with a chain, whose betas are a tensor, and an MLP."""
    save_model(tmp_path / "m.safetensors", model())
    return tmp_path / "m.safetensors"


def content(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def changed(path, tensors=lambda t: t, tree=lambda t: t, **about) -> None:
    """Write a file again with other tensors, description and metadata."""
    values, found = content(path)
    values = tensors(values) or values
    described = json.loads(found["model"])
    described = tree(described) or described
    metadata = found | {"model": json.dumps(described)} | about
    save_file(values, path, {k: v for k, v in metadata.items() if v is not None})


def refused(path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_the_unchanged_file_loads(path) -> None:
    changed(path)
    assert load_model(path).sde.steps == 25


def test_truncated_and_foreign_files(path) -> None:
    whole = path.read_bytes()
    for length in (0, 1, 7, 20, 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "expected a (model written by save_model|safetensors file), got")
    path.write_bytes(b"\x89PNG" + whole)
    refused(path, "expected a model written by save_model, got a PNG image")
    save_file({"a": torch.ones(2)}, path)
    refused(path, "expected a model written by save_model, got another kind of file")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(path.with_name("absent"))
    torch.save({"state": {}}, path)
    refused(path, "expected a checkpoint written by save_checkpoint, got another kind of file")


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({"model": '{"class": "EpsModel", '}, "expected JSON of a model, got"),
        ({"model": None}, "expected JSON of a model, got"),
        ({"model": '{"class": "A", "class": "B"}'}, "expected different names, got some twice"),
        ({"model": '{"class": NaN}'}, "expected a number, got NaN"),
        ({"model": "[" * 100_000}, "expected JSON of a model, got"),
        ({"version": "2"}, "expected version 1 or earlier, got 2: .* by a newer diffusionkit"),
        ({"version": "0"}, "expected version 1, got 0"),
        ({"version": None}, "expected version 1, got None"),
        ({"version": "1e400"}, "expected version 1, got None"),
        ({"format": "other"}, "got another kind of file"),
        ({"format": None}, "got another kind of file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata(path, about, match) -> None:
    changed(path, **about)
    refused(path, match)


def test_deep_descriptions() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(CheckpointError, match="file: expected a description, got one too deep"):
        built_model("file", deep, {}, {})


def put(place: str, value):
    """Return a change of a description: the value at a place."""

    def change(tree) -> None:
        *parts, last = place.split(".")
        node = tree
        for name in parts:
            node = node["arguments"][name]
        target = node if last in ("class", "arguments") else node["arguments"]
        target[last] = value

    return change


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (put("class", "Nowhere"), "model: expected a class of diffusionkit or a .* 'Nowhere'"),
        (put("network.class", "os.system"), "network: .* one, got 'os.system'; if it is your own"),
        (put("sde.class", "Chain"), "sde: expected a class .* got 'Chain'"),  # abstract
        (put("class", "NetworkModel"), "model: expected a class .* got 'NetworkModel'"),
        (put("sde.class", "suggest_sigma_max"), "sde: expected a class"),
        (put("sde.class", 3), "sde: expected a class .* got 3"),
        (put("label.class", "VPSDE"), "label: expected arguments of VPSDE, got .*'scale'"),
        (put("label.scale", -1.0), "label: expected arguments of TimeLabel, got scale: expected"),
        (put("variance", "small"), "model: expected arguments of EpsModel, got variance: expected"),
        (put("data_range", [1.0, 0.0]), "model: expected arguments of EpsModel, got data_range"),
        (put("network.arguments", [1]), "network: expected a description of a value, got"),
        (put("network.more", 1), "network: expected arguments of MLP, got .*more"),
        (put("label", {"function": "print"}), "label: expected a registered function, got 'print'"),
        (put("label", {"function": "VPSDE"}), "label: expected a registered function"),
        (put("label", {"same": "later"}), "label: expected a description of a value, got"),
        (put("label", {"tensor": "absent"}), "label: expected a description of a value, got"),
        (put("label", {"float": "1e3"}), "label: expected a description of a value"),
        (put("label", {}), "label: expected a description of a value, got {}"),
        (put("label", {"list": {}}), "label: expected a description of a value"),
        (put("sde", None), "model: expected arguments of EpsModel, got sde: expected a ForwardSDE"),
        (lambda tree: tree["arguments"]["sde"], "expected a score model, got DDPMChain"),
        (lambda tree: 3, "expected a score model, got int"),
        (lambda tree: {"same": ""}, "model: expected a description of a value"),
    ],
)
def test_descriptions(path, tree, match) -> None:
    changed(path, tree=tree)
    refused(path, match)


def nodes(tree, at=()):
    """The places of all values in a description."""
    yield at
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from nodes(value, (*at, key))


def test_any_wrong_value_in_a_description_is_a_checkpoint_error(path) -> None:
    tensors, about = content(path)
    state = {name: x for name, x in tensors.items() if not name.startswith("argument:")}
    sound, refusals = about["model"], 0
    for place in nodes(json.loads(sound)):
        for wrong in (3.5, "x", -1, True, None, [], {}, [[1]], 10**400, {"same": ""}, {"list": []}):
            tree = json.loads(sound)
            if place:
                node = tree
                for key in place[:-1]:
                    node = node[key]
                node[place[-1]] = wrong
            try:
                back = built_model("file", tree if place else wrong, tensors, state)
            except CheckpointError:
                refusals += 1
            else:  # another valid value
                assert isinstance(back, EpsModel)
                # Without arguments a part has the default ones.
                assert place[-1] in (
                    "scale",
                    "variance",
                    "data_range",
                    "out_features",
                    "label",
                    "num_classes",
                    "condition_features",
                    "arguments",
                ), place
    assert refusals > 150


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BIAS = "network.output.bias"


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (partial(without, name=BIAS), "1 problems: missing output.bias"),
        (lambda t: t | {"network.more": torch.ones(2)}, "1 problems: unexpected more"),
        (lambda t: t | {"more": torch.ones(2)}, "the model does not fit, 1 problems: unexpected"),
        (lambda t: t | {BIAS: torch.ones(3)}, r"output.bias: expected shape \(2,\), got \(3,\)"),
        (lambda t: t | {BIAS: torch.tensor([0.0, torch.nan])}, "output.bias: expected finite"),
        (lambda t: t | {BIAS: torch.tensor([0, 1])}, "expected torch.float32, got torch.int64"),
        (lambda t: t | {BIAS: torch.ones(2).to(torch.float8_e4m3fn)}, "of 16 to 64 bits, got"),
        (partial(without, name="argument:sde.betas"), "sde.betas: expected a description of a"),
    ],
)
def test_tensors(path, tensors, match) -> None:
    changed(path, tensors=tensors)
    refused(path, match)


@pytest.mark.parametrize(
    "tree",
    [
        put("network.width", 2**19),
        put("network.depth", 1000),
        put("sde", {"class": "LearnedSDE", "arguments": {"hidden": 2**24}}),
    ],
)
def test_a_small_file_takes_little_memory(path, tree, monkeypatch) -> None:
    changed(path, tree=tree)
    tracemalloc.start()
    taken = []
    empty, full = torch.empty, torch.full

    def counted(make):
        def made(*args, **kwargs):
            result = make(*args, **kwargs)
            taken.append(0 if result.is_meta else result.nbytes)
            return result

        return made

    monkeypatch.setattr(torch, "empty", counted(empty))
    monkeypatch.setattr(torch, "full", counted(full))
    refused(path, "expected")
    assert sum(taken) < 1e6
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_folders(tmp_path) -> None:
    folder, other = tmp_path / "m", tmp_path / "n"
    save_model(folder, model())
    save_model(other, model(6))
    text = (folder / "model.json").read_text()

    def broken(content: bytes, match: str) -> None:
        (folder / "model.json").write_bytes(content)
        refused(folder, match)

    broken(b"{", "model.json: expected JSON of a model, got")
    broken(b"\xff", "model.json: expected JSON of a model, got")
    broken(b"[]", "model.json: expected a model written by save_model, got list")
    broken(text.replace(".model", ".network").encode(), "got another kind of file")
    broken(text.replace('"version": 1', '"version": 7').encode(), "or earlier, got 7: .* newer")
    changed_text = text.replace('"width": 4', '"width": 5')
    assert changed_text != text
    broken(changed_text.encode(), "expected the description of the model in model.safetensors")
    # The half of a write: new weights, the old description.
    (folder / "model.json").write_text(text)
    shutil.copy(other / "model.safetensors", folder)
    refused(folder, "a write was interrupted; model.safetensors alone is a whole model")
    assert load_model(folder / "model.safetensors").network.config["width"] == 6
    os.unlink(folder / "model.json")
    with pytest.raises(FileNotFoundError, match=r"no model\.json in"):
        load_model(folder)


def test_training_checkpoints_are_models_too(tmp_path) -> None:
    run, trained = tmp_path / "run.pt", model()
    ema = EMA(trained, 0.5)
    with torch.no_grad():
        trained.network.output.bias += 1.0
    ema.update(trained)
    save_checkpoint(run, trained, ema=ema)
    averaged, last = load_model(run), load_model(run, ema=False)
    for back, own in ((averaged, ema.model), (last, trained)):
        assert type(back) is EpsModel
        assert torch.equal(back.sde.betas, trained.sde.betas)
        for name, value in own.state_dict().items():
            assert torch.equal(back.state_dict()[name], value)
    assert not torch.equal(averaged.network.output.bias, last.network.output.bias)
    save_checkpoint(run, trained)
    assert torch.equal(load_model(run).network.output.bias, last.network.output.bias)


def test_training_checkpoints_that_do_not_describe_one_model(tmp_path) -> None:
    run, trained = tmp_path / "run.pt", model()
    save_checkpoint(run, trained, ema=PowerEMA(trained, (0.05, 0.1)))
    refused(run, r"expected one average of the weights, got the lengths \[0.05, 0.1\]; use load_c")
    assert type(load_model(run, ema=False)) is EpsModel
    save_checkpoint(run, EpsModel(nn.Bilinear(2, 2, 2), VPSDE()))
    refused(run, "network: expected a class of diffusionkit or a registered one, got 'Bilinear'")
    save_checkpoint(run, nn.Linear(2, 2))
    refused(run, "model: expected a class .* 'Linear'")
    save_checkpoint(run, EpsModel(MLP(2, width=4), VPSDE(), label=lambda sde, t: t))
    refused(run, "label: expected a registered function, got None")
    save_checkpoint(run, trained)
    torch.save(as_version(3, torch.load(run, weights_only=True)), run)
    refused(run, "of version 4, which describes its model, got one of version 3; use load_check")
