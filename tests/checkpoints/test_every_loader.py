"""All loaders: entries that are no weights, prefixes, half precision, bad arguments, large demands.

The contents are given to the loaders in memory, see `given`.
"""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.released import EDM, OPENAI, SCORE_SDE, inputs, score_sde_config, score_sde_content
from support.released import shapes as layout
from support.released import weights as formula

from diffusionkit import CheckpointError
from diffusionkit.checkpoints import (
    load_edm,
    load_improved_diffusion,
    load_network,
    load_score_sde,
)
from diffusionkit.checkpoints._edm_arguments import edm_arguments
from diffusionkit.checkpoints._edm_keys import EDMObject
from diffusionkit.networks import MLP

PROGRAM = Path(__file__).parent / "hostile.py"


class Loader:
    """A loader with a valid file's weights: `load` takes other ones in their place."""

    def __init__(self, name, weights, load) -> None:
        self.name, self.weights, self.load = name, weights, load


def edm_object(case: str = "vp_other", **kwargs: Any) -> EDMObject:
    kwargs = {"img_resolution": 8, "img_channels": 3} | EDM[case]["kwargs"] | kwargs
    tensors = formula(layout("edm", case))
    return EDMObject(EDM[case]["precond"], (), kwargs, tensors)


@pytest.fixture(params=["score_sde", "averages", "ncsnv2", "improved", "edm", "own"])
def loader(request, given, monkeypatch) -> Loader:
    name = request.param
    if name in ("score_sde", "averages", "ncsnv2"):
        case = "ncsnv2_64" if name == "ncsnv2" else "vp_ddpmpp"
        content, config = score_sde_content(case, prefix=""), score_sde_config(case)
        model, sigmas = content["model"], content["model"].pop("sigmas")

        def load(weights):
            changed = content | {"model": weights | {"sigmas": sigmas}}
            if name == "averages":
                shadow = content["ema"] | {"shadow_params": list(weights.values())}
                changed |= {"ema": shadow, "model": content["model"] | {"sigmas": sigmas}}
            return load_score_sde(given(changed), config, ema=name == "averages")

        return Loader(name, model, load)
    if name == "improved":
        weights = formula(layout("openai", "improved_plain"))
        flags = OPENAI["improved_plain"]["flags"]
        return Loader(name, weights, lambda w: load_improved_diffusion(given(w), **flags))
    if name == "edm":
        ema = edm_object()

        def load_pickle(weights):
            changed = EDMObject(ema.class_name, (), ema.init_kwargs, weights)
            path = "diffusionkit.checkpoints.edm_files.read_edm_pickle"
            monkeypatch.setattr(path, lambda path: {"ema": changed})
            return load_edm("network.pkl")

        own = {n: t for n, t in ema.state_dict.items() if not n.endswith("resample_filter")}
        return Loader(name, own, load_pickle)
    torch.manual_seed(0)
    network = MLP(2, width=8, depth=1)
    about = {"format": "diffusionkit.network", "version": "1", "network": "MLP"}
    about |= {"config": json.dumps(network.config)}

    def load_own(weights):
        path = "diffusionkit.checkpoints.own.read_torch"
        monkeypatch.setattr(path, lambda path, *, expected: about | {"state": weights})
        return load_network("network.pt")

    return Loader(name, dict(network.state_dict()), load_own)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return dict(getattr(model, "network", model).state_dict())


FAULTS = {
    "int64": lambda w: w.long(),
    "uint8": lambda w: w.to(torch.uint8),
    "bool": lambda w: w > 0,
    "complex": lambda w: w.to(torch.complex64),
    "float8": lambda w: w.to(torch.float8_e5m2),
    "double": lambda w: w.double(),
    "nan": lambda w: w.clone().index_fill_(0, torch.tensor([0]), math.nan),
    "inf": lambda w: w.clone().index_fill_(0, torch.tensor([0]), -math.inf),
    "shape": lambda w: w[:-1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_entry_that_is_no_weight_is_named(loader, fault) -> None:
    for name in (list(loader.weights)[2], list(loader.weights)[-1]):
        changed = loader.weights | {name: FAULTS[fault](loader.weights[name])}
        with pytest.raises(CheckpointError) as caught:
            loader.load(changed)
        assert name.removeprefix("model.") in str(caught.value)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "extra", "expanded"])
def test_files_with_other_entries_are_rejected(loader, fault) -> None:
    name = list(loader.weights)[4]
    changed = dict(loader.weights)
    if fault == "missing":
        del changed[name]
    elif fault == "extra":
        changed["more.weight"] = torch.ones(3)
    else:
        changed = {n: torch.ones(()).expand(w.shape) for n, w in changed.items()}
    with pytest.raises(CheckpointError, match="expected|missing|unexpected"):
        loader.load(changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all", "convolutions"])
def test_weights_in_half_precision_are_loaded_exactly(loader, dtype, which) -> None:
    """Networks converted to half precision keep their normalizations in float32."""
    half = {n: w.to(dtype) if which == "all" or w.ndim > 1 else w for n, w in loader.weights.items()}
    got = state_of(loader.load(half))
    wanted = state_of(loader.load({n: w.float() for n, w in half.items()}))
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32 or loader.name == "own"
        assert torch.equal(tensor.float(), wanted[name])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "ema."])
def test_prefixes_in_files_of_improved_diffusion_are_understood(given, prefix) -> None:
    weights = formula(layout("openai", "improved_plain"))
    wanted = state_of(load_improved_diffusion(given(weights)))
    wrapped = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    got = state_of(load_improved_diffusion(given(wrapped)))
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_in_files_of_score_sde_are_understood(given, prefix) -> None:
    content, config = score_sde_content("vp_ddpmpp", prefix), score_sde_config("vp_ddpmpp")
    got = state_of(load_score_sde(given(content), config))
    plain = score_sde_content("vp_ddpmpp", prefix="")
    wanted = state_of(load_score_sde(given(plain), config))
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("decay", [math.nan, -0.1, 1.5, "0.999", True, [0.9]])
def test_decays_that_are_none_are_rejected(given, decay) -> None:
    content = score_sde_content("vp_ddpmpp")
    content["ema"]["decay"] = decay
    with pytest.raises(CheckpointError, match=r"ema\.decay: expected a number in \[0, 1\], got"):
        load_score_sde(given(content), score_sde_config("vp_ddpmpp"))


@pytest.mark.parametrize("count", [-1, 1.5, math.nan, "3", True, torch.tensor(-2)])
@pytest.mark.parametrize("name", ["ema.num_updates", "step"])
def test_counts_that_are_none_are_rejected(given, name, count) -> None:
    content = score_sde_content("vp_ddpmpp")
    section = content if name == "step" else content["ema"]
    section[name.split(".")[-1]] = count
    with pytest.raises(CheckpointError, match=rf"{name}: expected an integer >= 0, got"):
        load_score_sde(given(content), score_sde_config("vp_ddpmpp"))


def test_counts_may_be_tensors_or_missing(given) -> None:
    content = score_sde_content("vp_ddpmpp")
    content["step"] = torch.tensor(3)
    del content["ema"]["decay"], content["ema"]["num_updates"]
    load_score_sde(given(content), score_sde_config("vp_ddpmpp"))


def test_a_number_beyond_the_range_of_the_network_is_rejected(given) -> None:
    content, config = score_sde_content("vp_ddpmpp", ""), score_sde_config("vp_ddpmpp")
    network = load_score_sde(given(content), config).network.half()
    before = copy.deepcopy(network.state_dict())
    content["model"]["all_modules.2.weight"][0, 0, 0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"all_modules\.2\.weight: .* range of torch\.float16"):
        load_score_sde(given(content), network, ema=False)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


BAD = [None, -1, 0, 1.5, 10**30, "x", True, [], {}, math.nan, math.inf, [None], [-1], ["x"], 1j]


def accepted(call, *errors: type[Exception]) -> bool:
    """Whether a call succeeds; it may otherwise raise the errors, which name a problem."""
    try:
        call()
    except errors as error:
        assert "expected" in str(error) or "missing" in str(error), error
        return False
    return True


READ = [
    *(("model", name) for name in ("name", "nf", "num_res_blocks", "attn_resolutions", "dropout")),
    *(("model", name) for name in ("sigma_min", "sigma_max", "num_scales", "ch_mult", "fir")),
    *(("model", name) for name in ("resblock_type", "progressive", "progressive_input")),
    *(("model", name) for name in ("skip_rescale", "conditional", "scale_by_sigma", "fir_kernel")),
    *(("model", name) for name in ("resamp_with_conv", "nonlinearity", "embedding_type")),
    *(("data", name) for name in ("centered", "num_channels", "image_size")),
    *(("training", name) for name in ("sde", "continuous")),
]


@pytest.mark.parametrize(("section", "name"), READ)
def test_bad_values_in_configurations_are_rejected(given, section, name) -> None:
    content, good = score_sde_content("ve_ncsnpp"), score_sde_config("ve_ncsnpp")
    right = good[section].get(name)
    for value in BAD:
        if type(value) is type(right) and isinstance(value, bool | float):
            continue  # another value of the type may be right
        config = copy.deepcopy(good)
        config[section][name] = value
        if accepted(lambda c=config: load_score_sde(given(content), c), ValueError, TypeError):
            assert (name, value) in [("dropout", 0), ("attn_resolutions", [-1]), ("image_size", 0)]


@pytest.mark.parametrize("case", ["vp_other", "ve_other", "iddpm_other", "edm_dhariwal"])
def test_bad_arguments_in_pickles_of_edm_are_rejected(case) -> None:
    ema = edm_object(case)
    tensors = ema.state_dict | {"u": torch.zeros(ema.init_kwargs.get("M", 1000) + 1)}
    valid = edm_arguments(ema, tensors)
    for name, right in valid.items():
        for value in BAD:
            kwargs = ema.init_kwargs | {name: value}
            changed = EDMObject(ema.class_name, (), kwargs, tensors)
            if accepted(lambda c=changed: edm_arguments(c, tensors), ValueError, TypeError):
                # Another number or list of the right type: the tensors decide.
                kind = int | float if isinstance(right, float) else type(right)
                assert isinstance(value, kind | list)
                assert value in (0, 1.5, True, [], math.inf), (name, value)


@pytest.mark.parametrize("flag", ["num_heads", "num_heads_upsample", "num_head_channels"])
@pytest.mark.parametrize("value", [None, -2, 0, 1.5, 10**30, "4", True, [4], math.nan, 3])
def test_bad_counts_in_flags_are_rejected(given, flag, value) -> None:
    weights = formula(layout("openai", "improved_plain"))
    with pytest.raises((TypeError, ValueError), match="heads|head_channels"):
        load_improved_diffusion(given(weights), **{flag: value})


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("diffusion_steps", [None, -1, 0, 1.5, 10**30, 10**9, "4000", True, math.nan]),
        ("dropout", [None, -0.1, 1.0, 10**30, "0.1", True, math.nan]),
        ("noise_schedule", [None, 1, "sqrt", True, ["linear"]]),
        *(
            (flag, [None, 0, 1, "False", "yes", [True]])
            for flag in ("use_new_attention_order", "rescale_timesteps", "predict_xstart")
        ),
        ("sigma_small", [None, 1, "anything"]),
        ("learn_sigma", [1.5, "no", [True]]),
        ("class_cond", ["no", 1.5]),
        ("num_channels", ["32", True, 10**30]),
    ],
)
def test_bad_flags_are_rejected(given, flag, values) -> None:
    weights = formula(layout("openai", "improved_plain"))
    for value in values:
        with pytest.raises((TypeError, ValueError), match="expected"):
            load_improved_diffusion(given(weights), **{flag: value})
