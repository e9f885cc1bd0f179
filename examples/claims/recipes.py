"""The trained networks of the claims: a preset at each scale, and changes of it.

"small" takes the presets beside this file: networks of the papers' kind of width 16, with three
levels, for 16x16 glyphs and batches of 32; a training step takes a tenth of a second on one CPU
core. "full" takes the published presets of the training program, with glyphs of 32x32.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "images"))

import presets
from registry import Settings

FOLDER = Path(__file__).parent / "presets"
SCALES = ("small", "full")
START_STEPS = {"small": 800, "full": 100_000}
GLYPHS = ("data.source=glyphs", "data.size=32", "data.channels=1", "data.flip=false")
UNIFORM = ("dequantization.name=UniformDequantizer",)
STABLE = ("objective.target=StableTarget", "training.reference_size=1024")


@dataclass(frozen=True)
class Recipe:
    """A network to train.

    Args:
        small: the preset of the small scale, in presets/ here.
        full: the preset of the full scale, of the training program.
        changes: changes of both.
        small_changes: changes of the small one.
        full_changes: changes of the full one.
        start: the recipe that training starts from, after START_STEPS, from the same seed.
    """

    small: str
    full: str
    changes: tuple[str, ...] = ()
    small_changes: tuple[str, ...] = ()
    full_changes: tuple[str, ...] = ()
    start: str = ""

    def settings(self, scale: str, seed: int, steps: int, start_from: str = "") -> Settings:
        """Return the settings of a run, of a number of training steps, from a checkpoint or not."""
        if scale == "small":
            preset: str | Path = FOLDER / f"{self.small}.toml"
            changes = self.small_changes
        else:
            preset, changes = self.full, (*GLYPHS, *self.full_changes)
        given = (f"training.seed={seed}", f"training.steps={steps}", "run.save_every=1000",
                 "run.snapshot_every=1000000", "run.log_every=500", "run.keep=1",
                 f"training.start_from={json.dumps(start_from)}")  # fmt: skip
        return presets.load(preset, (*changes, *self.changes, *given))


_SIMPLE = ("objective.weighting=SimpleWeighting", "objective.times=UniformTimes")
_LW = ("objective.weighting=LikelihoodWeighting", "objective.times=UniformTimes")
_LW_IS = ("objective.weighting=LikelihoodWeighting",
          'objective.times={name = "ImportanceTimes", stratified = false}')  # fmt: skip
_SUBVP = ('process={name = "SubVPSDE", t_min = 1e-2}',)
_FIXED = ("network.learn_sigma=false", "model.variance=fixed_large",
          "sampler.predictor.variance=forward",
          'objective={name = "ScoreMatching", times = "DiscreteTimes"}')  # fmt: skip
_VLB = ('objective={name = "VLB", times = "LossSecondMomentTimes"}',)
_VLB_UNIFORM = ('objective={name = "VLB", times = "DiscreteTimes"}',)
_LINEAR = ("process.name=DDPMChain.linear",)
_T4000 = ("process.steps=4000", "model.label.steps=4000")
_FLOW = "score-flow-cifar10-vp"
_DEQUANTIZER = (
    'dequantization={name = "VariationalDequantizer", steps = 2, width = 16, components = 8, '
    "context_width = 8, blocks = 1, heads = 2}",
    "training.learn=dequantizer", *_LW_IS,
)  # fmt: skip

WIDTHS = {"cosine, hybrid, width 8": 8, "cosine, hybrid": 16, "cosine, hybrid, width 24": 24}

RECIPES = {
    "EDM": Recipe("edm", "glyphs"),
    "EDM, stable target": Recipe("edm", "glyphs", STABLE),
    "EDM, uniform weighting": Recipe("edm", "glyphs", ("objective.weighting=SimpleWeighting",)),
    "VE": Recipe("ve", "score-sde-cifar10-ncsnpp-ve", full_changes=UNIFORM),
    "VE, stable target": Recipe("ve", "stf-cifar10-ncsnpp-ve", STABLE, full_changes=UNIFORM),
    "VE, color patches": Recipe(  # the largest distance of two of 16x16 pixels is about 24
        "ve",
        "score-sde-cifar10-ncsnpp-ve",
        ("data.source=color-patches", "data.channels=3"),
        small_changes=("process.sigma_max=24.0",),
        full_changes=UNIFORM,
    ),
    "VP": Recipe("vp", _FLOW, _SIMPLE),
    "VP, stable target": Recipe("vp", _FLOW, (*_SIMPLE, *STABLE)),
    "VP, LW": Recipe("vp", _FLOW, _LW),
    "VP, LW, no clipping": Recipe("vp", _FLOW, (*_LW, "training.clip=inf")),
    "VP, LW + IS, no clipping": Recipe("vp", _FLOW, (*_LW_IS, "training.clip=inf")),
    "VP, LW + IS": Recipe("vp", _FLOW, _LW_IS),
    "VP, LW + IS, learned dequantizer": Recipe(
        "vp", f"{_FLOW}-dequantizer", small_changes=_DEQUANTIZER, start="VP, LW + IS"
    ),
    "sub-VP": Recipe("vp", "score-flow-cifar10-subvp", _SIMPLE, small_changes=_SUBVP),
    "linear, hybrid": Recipe("chain", "improved-ddpm-cifar10-linear-hybrid", small_changes=_LINEAR),
    "linear, VLB": Recipe("chain", "improved-ddpm-cifar10-linear-hybrid", _VLB, _LINEAR),
    "cosine, simple": Recipe("chain", "improved-ddpm-cifar10-cosine-hybrid", _FIXED),
    "cosine, hybrid": Recipe("chain", "improved-ddpm-cifar10-cosine-hybrid"),
    "linear, hybrid, T = 4000": Recipe(
        "chain", "improved-ddpm-cifar10-linear-hybrid", small_changes=(*_LINEAR, *_T4000)
    ),
    "cosine, hybrid, T = 4000": Recipe(
        "chain", "improved-ddpm-cifar10-cosine-hybrid", small_changes=_T4000
    ),
    "cosine, hybrid, width 8": Recipe(
        "chain",
        "improved-ddpm-cifar10-cosine-hybrid",
        small_changes=("network.width=8",),
        full_changes=("network.width=64",),
    ),
    "cosine, hybrid, width 24": Recipe(
        "chain",
        "improved-ddpm-cifar10-cosine-hybrid",
        small_changes=("network.width=24",),
        full_changes=("network.width=192",),
    ),
    "cosine, VLB": Recipe("chain", "improved-ddpm-cifar10-cosine-vlb", _VLB),
    "cosine, VLB, uniform steps": Recipe("chain", "improved-ddpm-cifar10-cosine-vlb", _VLB_UNIFORM),
}
