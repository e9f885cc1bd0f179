"""Presets of the images programs: their published values, one step of each, and bad input."""

import math
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusionkit import (
    CheckpointError,
    ScoreMatching,
    clipped_step,
    normalize_weights,
    save_checkpoint,
)

IMAGES = Path(__file__).parents[2] / "examples" / "images"
NAMES = sorted(path.stem for path in (IMAGES / "presets").glob("*.toml"))

# Trainable or not, as published or counted in the released code.
PARAMETERS = {
    "score-sde-cifar10-ncsnpp-ve": 62_758_915,
    "score-sde-cifar10-ncsnpp-deep-ve": 107_587_075,
    "score-sde-cifar10-ddpmpp-vp": 61_804_419,
    "score-sde-cifar10-ddpmpp-deep-subvp": 106_632_579,
    "score-sde-celebahq256-ncsnpp-ve": 65_574_549,
    "score-sde-celebahq1024-ncsnpp-ve": 105_785_896,
    "improved-ddpm-cifar10-cosine-hybrid": 52_546_438,
    "edm-cifar10-ddpmpp": 55_733_891,
    "edm-cifar10-ncsnpp": 56_397_955,
}
# (batch, steps, warm-up, clip, learning rate, decay, dropout, sampler's steps)
SONG = (128, 1_300_000, 5000, 1.0, 2e-4)
DEEP = (128, 950_000, 5000, 1.0, 2e-4)
DDPM = (128, 500_000, 0, math.inf, 1e-4, 0.9999)
EDM = (512, 390_625, 19_531, math.inf, 1e-3, None, 0.13, 18)
PUBLISHED = {
    "score-sde-cifar10-ncsnpp-ve": (*SONG, 0.999, 0.1, 1000),
    "score-sde-cifar10-ncsnpp-deep-ve": (*DEEP, 0.999, 0.1, 1000),
    "score-sde-cifar10-ddpmpp-vp": (*SONG, 0.9999, 0.1, 1000),
    "score-sde-cifar10-ddpmpp-subvp": (*SONG, 0.9999, 0.1, 1000),
    "score-sde-cifar10-ddpmpp-deep-vp": (*DEEP, 0.9999, 0.1, 1000),
    "score-sde-cifar10-ddpmpp-deep-subvp": (*DEEP, 0.9999, 0.1, 1000),
    "score-sde-celebahq256-ncsnpp-ve": (64, 2_400_000, 5000, 1.0, 2e-4, 0.999, 0.0, 2000),
    "score-sde-celebahq1024-ncsnpp-ve": (8, 2_400_000, 5000, 1.0, 2e-4, 0.9999, 0.0, 2000),
    "score-flow-cifar10-vp": (*SONG, 0.9999, 0.1, None),
    "score-flow-cifar10-subvp": (*SONG, 0.9999, 0.1, None),
    "score-flow-cifar10-deep-vp": (*DEEP, 0.9999, 0.1, None),
    "score-flow-cifar10-deep-subvp": (*DEEP, 0.9999, 0.1, None),
    "score-flow-imagenet32-vp": (*SONG, 0.9999, 0.0, None),
    "score-flow-imagenet32-subvp": (*SONG, 0.9999, 0.0, None),
    "score-flow-imagenet32-deep-vp": (*DEEP, 0.9999, 0.0, None),
    "score-flow-imagenet32-deep-subvp": (*DEEP, 0.9999, 0.0, None),
    "score-flow-cifar10-vp-dequantizer": (128, 300_000, 5000, 1.0, 2e-4, 0.99, 0.0, None),
    "improved-ddpm-cifar10-cosine-hybrid": (*DDPM, 0.3, 4000),
    "improved-ddpm-cifar10-cosine-vlb": (*DDPM, 0.3, 4000),
    "improved-ddpm-cifar10-linear-hybrid": (*DDPM, 0.1, 4000),
    "improved-ddpm-imagenet64-cosine-hybrid": (128, 1_500_000, *DDPM[2:], 0.0, 4000),
    "improved-ddpm-imagenet64-cosine-vlb": (128, 1_500_000, *DDPM[2:], 0.0, 4000),
    "improved-ddpm-imagenet64-conditional": (2048, 250_000, 0, math.inf, 3e-4, 0.9999, 0.0, 4000),
    "edm-cifar10-ddpmpp": EDM,
    "edm-cifar10-ncsnpp": EDM,
    "edm-cifar10-ddpmpp-conditional": EDM,
    "edm-cifar10-ncsnpp-conditional": EDM,
    "stf-cifar10-edm-ddpmpp": EDM,
    "stf-cifar10-edm-ncsnpp": EDM,
    "stf-cifar10-ncsnpp-ve": (*SONG, 0.999, 0.1, 1000),
}


# Changes that make any network small.
NARROW = ["network.width=16", "network.blocks=1"]


@pytest.fixture
def presets(program):
    pytest.importorskip("matplotlib")  # of glyphs
    return program("presets")


def step(presets, settings, size):
    """Take a training step and return the parts."""
    training, batch = settings["training"], 2
    parts = presets.build(settings)
    x = torch.zeros(batch, settings["data"]["channels"], size, size)
    if settings["data"]["range"] == [-1, 1]:
        x = x + 1 / 255  # a level
    given = {}
    if parts.augmentation is not None:
        given["condition"] = torch.zeros(batch, 9)
    if settings["data"]["classes"]:
        given["class_labels"] = torch.zeros(batch, dtype=torch.long)
    if training["reference_size"]:
        given["reference"] = torch.cat([x, x])
    parameters = [p for p in parts.model.parameters() if p.requires_grad]
    if training["learn"] == "model":
        optimizer = presets.optimizer(settings, parameters)
        scheduler = presets.scheduler(settings, optimizer)
        if training["normalize"]:
            normalize_weights(parts.model)
        parts.objective(parts.model, x, **given).mean().backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        scheduler.step()
    else:
        assert presets.optimizer(settings, parts.dequantizer.parameters())
        parts.objective.nats(parts.model, x).mean()
        assert not parameters
    presets.average(settings, parts.model)
    return parts


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_takes_a_step(presets, name):
    """A narrow network of the preset's kind; the networks themselves are slow without a GPU."""
    width = 4 if "1024" in name else 16  # of which the last level has 32 times as much
    depth = "depth" if name.endswith("-dit") else "blocks"
    settings = presets.load(name, [f"network.width={width}", f"network.{depth}=1"])
    size = {256: 64, 1024: 128}.get(settings["data"]["size"], 16)
    parts = step(presets, settings, size)
    sampler = presets.sampler(settings, parts.model, **few_steps(settings))
    assert callable(sampler)
    assert parts.model.data_range == tuple(settings["data"]["range"])
    assert settings["preset"] == name


def test_samplers_ask_for_a_learned_variance_only_where_there_is_one(presets):
    """Ancestral(variance="model") raises in its first step without one."""
    asking = []
    for name in NAMES:
        settings = presets.load(name)
        predictor = settings["sampler"].get("predictor") or {}
        if predictor.get("variance") == "model":
            asking.append(name)
            assert settings["model"]["variance"] in ("learned", "learned_range"), name
    assert "improved-ddpm-cifar10-cosine-hybrid" in asking


def few_steps(settings):
    return {"steps": 3} if "steps" in settings["sampler"] else {}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_takes_a_step_at_its_size(presets, name):
    """On meta tensors, which have no values."""
    settings = presets.load(name)
    with torch.device("meta"):
        parts = presets.build(settings)
        size = settings["data"]["size"]
        x = torch.zeros(2, settings["data"]["channels"], size, size)
        given = {"t": torch.full((2,), 0.5)}
        if settings["data"]["classes"]:
            given["class_labels"] = torch.zeros(2, dtype=torch.long)
    loss = ScoreMatching()(parts.model, x, **given).mean()
    if settings["training"]["learn"] == "model":
        loss.backward()
        presets.optimizer(settings, parts.model.parameters()).step()
    presets.average(settings, parts.model)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_of_published_networks(presets, name, count):
    with torch.device("meta"):
        network = presets.build(presets.load(name)).network
    assert sum(p.numel() for p in network.parameters()) == count


def test_every_paper_is_compared():
    small = [name for name in NAMES if "glyphs" in name] + ["small-images", "color-patches"]
    left = {*NAMES} - {*PUBLISHED} - {*small}
    assert left == {
        "improved-ddpm-cifar10-linear-simple",
        "score-flow-imagenet32-deep-subvp-dequantizer",
    }


@pytest.mark.parametrize(("name", "values"), PUBLISHED.items())
def test_published_training(presets, name, values):
    settings = presets.load(name)
    batch, steps, warmup, clip, lr, decay, dropout, sampler_steps = values
    training, network = settings["training"], settings["network"]
    assert (training["warmup"], training["clip"]) == (warmup, clip)
    assert (training["batch"], training["steps"]) == (batch, steps)
    assert settings["optimizer"]["lr"] == lr
    assert settings["optimizer"]["betas"] == [0.9, 0.999]
    assert settings["optimizer"]["eps"] == 1e-8
    assert settings["sampler"].get("steps") == sampler_steps
    if dropout or "dropout" in network:
        assert network["dropout"] == dropout
    if decay is None:
        half_life = {"name": "HalfLife", "images": 500_000, "ramp_up": 0.05}
        assert settings["average"]["decay"] == half_life
    else:
        assert settings["average"]["decay"] == decay


def test_published_processes(presets):
    def process(name):
        return presets.build(presets.load(name, NARROW)).sde

    assert process("score-sde-cifar10-ncsnpp-ve").sigma_max == 50
    assert process("score-sde-celebahq256-ncsnpp-ve").sigma_max == 348
    assert process("score-sde-celebahq1024-ncsnpp-ve").sigma_max == 1348
    for name in ("score-sde-cifar10-ddpmpp-vp", "score-sde-cifar10-ddpmpp-subvp"):
        assert (process(name).beta_min, process(name).beta_max) == (0.1, 20)
    times = {"cifar10-vp": 1e-5, "cifar10-subvp": 1e-2, "imagenet32-vp": 5e-5}
    for name, smallest in times.items():
        assert process(f"score-flow-{name}").t_min == smallest
    chain = process("improved-ddpm-cifar10-cosine-hybrid")
    assert chain.steps == 4000
    assert (process("edm-cifar10-ddpmpp").t_min, process("edm-cifar10-ddpmpp").T) == (0.002, 80)


def test_published_correctors_and_references(presets):
    snr = {"cifar10": 0.16, "celebahq256": 0.075, "celebahq1024": 0.15}
    for data, value in snr.items():
        settings = presets.load(f"score-sde-{data}-ncsnpp-ve")
        assert settings["sampler"]["corrector"] == {
            "name": "Langevin", "snr": value, "norm": "batch",
        }  # fmt: skip
    assert presets.load("stf-cifar10-ncsnpp-ve")["training"]["reference_size"] == 4096
    assert presets.load("stf-cifar10-edm-ncsnpp")["training"]["reference_size"] == 1024


@pytest.mark.parametrize(("name", "scale"), [
    ("score-sde-cifar10-ncsnpp-ve", 0.5 * 32 * 32 * 3),
    ("score-sde-cifar10-ddpmpp-vp", 1),
    ("score-sde-celebahq256-ncsnpp-ve", 0.5 * 256 * 256 * 3),
    ("score-flow-cifar10-vp", 0.99999 / 23.864472365),
    ("score-flow-cifar10-subvp", 0.99 / 22.484135752),
    ("improved-ddpm-cifar10-cosine-hybrid", 1),
    ("edm-cifar10-ddpmpp", 3072),
])  # fmt: skip
def test_published_scale_of_the_loss(presets, name, scale):
    assert presets.load(name)["training"]["loss_scale"] == pytest.approx(scale, rel=2e-5)


def test_the_learning_rate_decays_where_a_preset_says_so(presets):
    settings = presets.load("tiny-glyphs-edm2", ["training.decay_after=4", "training.warmup=2"])
    optimizer = presets.optimizer(settings, [nn.Parameter(torch.zeros(1))])
    scheduler = presets.scheduler(settings, optimizer)
    rates = []
    for _ in range(17):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01])
    assert rates[16] == pytest.approx(0.005)


def test_settings_are_shown_as_they_are_read(presets):
    for name in NAMES:
        settings = presets.load(name, ["training.clip=inf", 'data.source="a \\"b\\""'])
        assert tomllib.loads(presets.show(settings)) == settings


def test_changes(presets):
    changes = ["optimizer.lr=3e-4", "sampler.predictor=DDIM", "network.multipliers=[1, 1]",
               "data.source=my/folder", 'average={name="PowerEMA", sigma_rels=[0.05, 0.1]}',
               "run.precision=bfloat16", "training.clip=2"]  # fmt: skip
    settings = presets.load("tiny-glyphs", changes)
    assert settings["optimizer"] == {"name": "Adam", "lr": 3e-4}
    assert settings["sampler"]["predictor"] == {"name": "DDIM"}
    assert settings["data"]["source"] == "my/folder"
    assert settings["average"]["sigma_rels"] == [0.05, 0.1]
    assert presets.build(settings).network.config["multipliers"] == (1, 1)


@pytest.mark.parametrize(("change", "message"), [
    ("optimiser.lr=1", "expected one of optimizer, got 'optimiser'"),
    ("optimizer.lrr=1", "[optimizer] Adam: expected one of lr, got 'lrr'"),
    ("training.step=1", "[training]: expected one of steps"),
    ("network.blokcs=1", "[network] DDPMpp: expected one of blocks"),
    ("network.name=DDPM", "[network] name: expected one of DDPMpp"),
    ("sampler.name=VPSDE", "[sampler] name: expected one of PCSampler, ProbabilityFlow"),
    ("sampler.predictor=Huen", "[sampler.predictor] name: expected one of Heun"),
    ("sampler.predictor={name='Heun', alfa=1}", "[sampler.predictor] Heun: expected one of alpha"),
    ("optimizer.lr=fast", "[optimizer] lr: expected a number, got 'fast'"),
    ("optimizer.lr=true", "[optimizer] lr: expected a number, got True"),
    ("training.batch=6.5", "[training] batch: expected a whole number, got 6.5"),
    ("data.flip=1", "[data] flip: expected true or false, got 1"),
    ("run.precision=float16", "[run] precision: expected float32 or bfloat16, got 'float16'"),
    ("network.width={name=1}", "[network] width: expected a plain value, got {'name': 1}"),
    ("model=3", "[model]: expected a table with a name, got 3"),
    ("optimizer.lr", "--set: expected section.key=value, got 'optimizer.lr'"),
    ("optimizer.lr=1e", "--set optimizer.lr=1e: expected a TOML value, got '1e'"),
    ("optimizer.lr.x=1", "--set optimizer.lr.x=1: expected a table at lr, got 0.001"),
    ("data.range=[1, 0]", "data_range"),
    ("data.range=[1]", "[data] range: expected [lowest, highest], got [1]"),
])  # fmt: skip
def test_wrong_changes_are_named(presets, change, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        presets.build(presets.load("tiny-glyphs", [change]))


def test_numbers_out_of_their_limits_are_named_before_anything_is_made(presets):
    numbers = {
        f"{section}.{key}": default
        for section, values in presets.PLAIN.items()
        for key, default in values.items()
        if type(default) in (int, float)
    }
    assert numbers.keys() == presets.LIMITS.keys()
    for key, (low, high) in presets.LIMITS.items():
        section, name = key.split(".")
        wrong = [low - 1, *([low] if key in presets.OPEN else [])]
        wrong += [high + 1] if high < float("inf") else []
        wrong += ["nan"] if type(numbers[key]) is float else []
        for value in wrong:
            message = re.escape(f"[{section}] {name}: expected a number >")
            with pytest.raises(ValueError, match=message):
                presets.load("tiny-glyphs", [f"{key}={value}"])
        presets.load("tiny-glyphs", [f"{key}={low + (key in presets.OPEN)}"])


def test_a_wrong_value_is_named_with_its_section(presets):
    settings = presets.load("tiny-glyphs", ["network.dropout=2.0"])
    with pytest.raises(ValueError, match=r"^\[network\] DDPMpp: dropout: expected"):
        presets.build(settings)


def test_an_unknown_preset_is_refused_with_the_nearest(presets, tmp_path):
    with pytest.raises(ValueError, match=r"preset: expected one of tiny-glyphs.*'tiny-glyph'"):
        presets.load("tiny-glyph")
    (tmp_path / "own.toml").write_text("[data\n")
    with pytest.raises(ValueError, match=r"own\.toml: expected a TOML file, got"):
        presets.load(tmp_path / "own.toml")
    (tmp_path / "own.toml").write_text("[data]\nsize = 8\n")
    with pytest.raises(ValueError, match=r"preset: expected a section \[process\], got none"):
        presets.load(tmp_path / "own.toml")


def test_a_preset_can_call_nothing_else(presets):
    for name in ("os.system", "PCSampler.__init__", "NCSNpp.load_state_dict", "Module"):
        with pytest.raises(ValueError, match="name: expected one of"):
            presets.load("tiny-glyphs", [f'network={{name="{name}"}}'])


TINY = ["network.width=8", "network.multipliers=[1]", "network.attention_levels=[]"]


def test_a_model_is_restored_from_its_checkpoint(presets, tmp_path, caplog):
    settings = presets.load("tiny-glyphs", TINY)
    parts = presets.build(settings)
    average = presets.average(settings, parts.model)
    optimizer = presets.optimizer(settings, parts.model.parameters())
    parts.objective(parts.model, torch.zeros(2, 1, 16, 16)).mean().backward()
    clipped_step(optimizer)
    average.update(parts.model)
    path = tmp_path / "step.pt"
    save_checkpoint(path, parts.model, ema=average, optimizer=optimizer, step=1,
                    extra={"settings": settings})  # fmt: skip
    run = presets.restore(path, changes=["sampler.steps=2"])
    assert run.step == 1
    assert run.settings["sampler"]["steps"] == 2
    assert not run.model.training
    for name, value in average.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value)
    assert presets.sampler(run.settings, run.model)((2, 1, 16, 16)).shape == (2, 1, 16, 16)
    assert not caplog.records  # of the moments that nobody asked for
    begun = presets.load("tiny-glyphs", [*TINY, f'training.start_from="{path}"'])
    other = presets.build(begun).model
    presets.start(begun, other)
    assert torch.equal(next(other.parameters()), next(average.model.parameters()))


def test_a_trained_dequantizer_is_restored(presets, tmp_path):
    changes = [*NARROW, "dequantization.width=8", "dequantization.steps=1"]
    settings = presets.load("score-flow-cifar10-vp-dequantizer", changes)
    parts = presets.build(settings)
    parts.dequantizer(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))  # sets its scales
    with torch.no_grad():
        for parameter in parts.dequantizer.parameters():
            parameter.add_(0.1)
    path, average = tmp_path / "step.pt", presets.average(settings, parts.model)
    save_checkpoint(path, parts.model, ema=average, extra={"settings": settings},
                    stateful={"dequantizer": parts.dequantizer})  # fmt: skip
    restored = presets.restore(path).parts.dequantizer
    for name, value in parts.dequantizer.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


def test_checkpoints_without_settings_are_refused(presets, tmp_path):
    path = tmp_path / "step.pt"
    save_checkpoint(path, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"step\.pt: expected a checkpoint of train\.py"):
        presets.restore(path)
    save_checkpoint(path, nn.Linear(2, 2), extra={"settings": {"networks": {}}})
    with pytest.raises(CheckpointError, match=r"step\.pt: preset: expected one of network"):
        presets.restore(path)


def test_checkpoints_of_another_network_are_refused(presets, tmp_path):
    settings = presets.load("tiny-glyphs", TINY)
    parts, path = presets.build(settings), tmp_path / "step.pt"
    average = presets.average(settings, parts.model)
    save_checkpoint(path, parts.model, ema=average, extra={"settings": settings})
    with pytest.raises(CheckpointError, match=r"step\.pt"):
        presets.restore(path, changes=["network.width=16"])
