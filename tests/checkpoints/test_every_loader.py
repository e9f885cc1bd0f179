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
from support.released import (
    EDM,
    EDM2,
    OPENAI,
    dit_weights,
    edm2_tensors,
    score_sde_config,
    score_sde_content,
)
from support.released import shapes as layout
from support.released import weights as formula

from diffusionkit import CheckpointError
from diffusionkit.checkpoints import (
    load_dit,
    load_edm,
    load_edm2,
    load_improved_diffusion,
    load_network,
    load_score_sde,
)
from diffusionkit.checkpoints._edm_arguments import edm_arguments
from diffusionkit.checkpoints._edm_keys import EDMObject
from diffusionkit.networks import MLP

PROGRAM = Path(__file__).parent / "demanding.py"


class Loader:
    """A loader with a valid file's weights: `load` takes other ones in their place."""

    def __init__(self, name, weights, load) -> None:
        self.name, self.weights, self.load = name, weights, load


def edm_object(case: str = "vp_other", **kwargs: Any) -> EDMObject:
    kwargs = {"img_resolution": 8, "img_channels": 3} | EDM[case]["kwargs"] | kwargs
    tensors = formula(layout("edm", case))
    return EDMObject(EDM[case]["precond"], (), kwargs, tensors)


@pytest.fixture(params=["score_sde", "averages", "ncsnv2", "improved", "dit", "edm", "edm2", "own"])
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
    if name == "dit":
        return Loader(name, dit_weights("dit_learned"), lambda w: load_dit(given(w), heads=4))
    if name == "edm":
        ema = edm_object()

        def load_pickle(weights):
            changed = EDMObject(ema.class_name, (), ema.init_kwargs, weights)
            path = "diffusionkit.checkpoints.edm_files.read_edm_pickle"
            monkeypatch.setattr(path, lambda path: {"ema": changed})
            return load_edm("network.pkl")

        own = {n: t for n, t in ema.state_dict.items() if not n.endswith("resample_filter")}
        return Loader(name, own, load_pickle)
    if name == "edm2":
        kwargs = {"img_resolution": 8} | EDM2["other"]["kwargs"]
        encoder = EDMObject("StabilityVAEEncoder", (), {}, {})

        def load_newer(weights):
            changed = EDMObject("Precond", (), kwargs, weights)
            path = "diffusionkit.checkpoints.edm2_files.read_edm_pickle"
            monkeypatch.setattr(path, lambda path: {"ema": changed, "encoder": encoder})
            return load_edm2("network.pkl")

        return Loader(name, edm2_tensors("other"), load_newer)
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
    name = list(loader.weights)[2 if [*FAULTS].index(fault) % 2 else -1]
    changed = loader.weights | {name: FAULTS[fault](loader.weights[name])}
    with pytest.raises(CheckpointError) as caught:
        loader.load(changed)
    assert name.removeprefix("model.").removeprefix("unet.") in str(caught.value)
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
    with pytest.raises(CheckpointError, match=r"expected|missing|unexpected"):
        loader.load(changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all", "convolutions"])
def test_weights_in_half_precision_are_loaded_exactly(loader, dtype, which) -> None:
    """Networks converted to half precision keep their normalizations in float32."""
    half = {
        n: w.to(dtype) if which == "all" or w.ndim > 1 else w for n, w in loader.weights.items()
    }
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
    with pytest.raises(
        CheckpointError, match=r"all_modules\.2\.weight: .* range of torch\.float16"
    ):
        load_score_sde(given(content), network, ema=False)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


BAD = [None, -1, 0, 1.5, 10**30, "x", True, [], {}, math.nan, math.inf, [None], [-1], ["x"], 1j]


def accepted(call) -> bool:
    """Whether a call succeeds, rather than naming a problem."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return "expected" not in str(error) and "missing" not in str(error)
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
        if accepted(lambda c=config: load_score_sde(given(content), c)):
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
            if accepted(lambda c=changed: edm_arguments(c, tensors)):
                # Another number or list of the right type: the tensors decide.
                kind = int | float if isinstance(right, float) else type(right)
                assert isinstance(value, kind | list)
                assert value in (0, 1.5, True, [], math.inf), (name, value)


@pytest.mark.parametrize("flag", ["num_heads", "num_heads_upsample", "num_head_channels"])
@pytest.mark.parametrize("value", [None, -2, 0, 1.5, 10**30, "4", True, [4], math.nan, 3])
def test_bad_counts_in_flags_are_rejected(given, flag, value) -> None:
    weights = formula(layout("openai", "improved_plain"))
    with pytest.raises((TypeError, ValueError), match=r"heads|head_channels"):
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


def save_demanding_files(folder: Path, written) -> None:
    """Write files of a few kilobytes that ask for networks of any size."""
    for i, kwargs in enumerate(
        [
            {"num_blocks": 10**7},
            {"model_channels": 2**30},
            {"model_channels": 10**30},
            {"channel_mult": [1] * 10**4, "img_resolution": 2**30},
            {"channel_mult": [2**30, 2**30]},
            {"label_dim": 2**31 - 1, "augment_dim": 2**31 - 1},
            {"img_channels": 2**31 - 1},
            {"resample_filter": [1] * 10**4},
            {"attn_resolutions": list(range(1, 10**4))},
            {"M": 10**9},
        ]
    ):
        case = "iddpm_other" if "M" in kwargs else "vp_other"
        tensors = formula(layout("edm", case)) | {"u": torch.zeros(101)}
        path = Path(written(EDM[case]["precond"], EDM[case]["kwargs"] | kwargs, tensors))
        path.rename(folder / f"edm-{i}.pkl")
    for i, kwargs in enumerate(
        [{"num_blocks": 10**7}, {"model_channels": 2**18}, {"channel_mult": [1] * 10**4}]
    ):
        kwargs = EDM2["other"]["kwargs"] | kwargs | {"img_resolution": 2**30}
        path = Path(written("Precond", kwargs, edm2_tensors("other"), "StandardRGBEncoder"))
        path.rename(folder / f"edm2-{i}.pkl")
    networks = {
        "MLP": [{"depth": 10**9}, {"width": 2**20}, {"num_classes": 2**31 - 1}],
        "NCSNpp": [{"blocks": 10**7}, {"multipliers": [1] * 10**4}, {"width": 2**16}],
        "ADMUNet": [{"blocks": 10**9}, {"width": 10**30}, {"multipliers": [1e300]}],
        "DiT": [{"depth": 1000}, {"width": 2**20, "heads": 1}, {"patch_size": 2**20}],
        "EDM2UNet": [{"blocks": 10**9}, {"width": 2**16}, {"head_channels": 0}],
        "NCSNv2": [{"levels": [[2**30, 1]] * 1000, "sigmas": [2.0, 1.0]}],
    }
    for name, changes in networks.items():
        for i, change in enumerate(changes):
            first = {"features": 2} if name == "MLP" else {"channels": 3}
            about = {"format": "diffusionkit.network", "version": "1", "network": name}
            state = dict(MLP(2, width=8, depth=1).state_dict())
            content = about | {"config": json.dumps(first | change), "state": state}
            torch.save(content, folder / f"own-{name}{i}.pt")
    good = score_sde_content("vp_ddpmpp")
    for i, change in enumerate(
        [
            {"num_res_blocks": 10**7},
            {"nf": 2**30},
            {"nf": 10**30},
            {"num_scales": 10**9},
            {"ch_mult": [1] * 10**4},
            {"ch_mult": [2**30]},
        ]
    ):
        config = score_sde_config("vp_ddpmpp")
        config["model"] |= change
        torch.save(good, folder / f"configured-{i}.pth")
        (folder / f"configured-{i}.json").write_text(json.dumps(config))
    one = torch.ones(())
    modules = {f"all_modules.{i}.Conv_1.weight": torch.ones(1, 1, 1, 1) for i in range(500)}
    inferred = {
        "begin": {"begin_conv.weight": one.expand(60, 60, 3, 3), "res1.0.conv1.weight": one},
        "numbers": {"all_modules.0.weight": torch.ones(8, 8), "all_modules.9999.x": one},
        "modules": {"all_modules.0.weight": torch.ones(8, 3, 3, 3), **modules},
    }
    for name, tensors in inferred.items():
        model = {"sigmas": torch.tensor([2.0, 1.0])} | tensors
        ema = {"shadow_params": list(tensors.values())}
        torch.save({"model": model, "ema": ema}, folder / f"score-{name}.pth")
    adm = formula(layout("openai", "improved_plain"))
    for name, more in {
        "numbers": {"output_blocks.9999.1.conv.weight": one, "input_blocks.9999.0.x": one},
        "downs": {f"input_blocks.{i}.0.x": one for i in range(0, 1000, 2)},
        "wide": {"time_embed.0.weight": one.expand(64, 50)},
        "expanded": {key: one.expand(w.shape) for key, w in adm.items()},
    }.items():
        torch.save(adm | more, folder / f"improved-{name}.pt")
    dit = dit_weights("dit_learned")
    for name, more in {
        "blocks": {f"blocks.{i}.x": one for i in range(10**4)},
        "positions": {"pos_embed": one.expand(1, 2**16, 32)},
        "classes": {"y_embedder.embedding_table.weight": one.expand(2**20, 32)},
        "expanded": {key: one.expand(w.shape) for key, w in dit.items()},
    }.items():
        torch.save(dit | more, folder / f"dit-{name}.pt")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as on Linux")
def test_files_that_ask_for_more_than_they_bring_are_rejected(tmp_path, written) -> None:
    folder = tmp_path / "demanding"
    folder.mkdir()
    save_demanding_files(folder, written)
    assert max(file.stat().st_size for file in folder.iterdir()) < 4e6
    command = [sys.executable, str(PROGRAM), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    report = json.loads(ran.stdout)
    assert len(report) > 30
    for name, (seconds, said) in report.items():
        assert said.startswith(("CheckpointError: ", "ValueError: ")), (name, said)
        assert "expected" in said or "missing" in said, (name, said)
        assert seconds < 5, name
