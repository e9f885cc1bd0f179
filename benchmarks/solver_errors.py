"""Measure the error of every deterministic solver against evaluations, and of released ones.

On a mixture of three Gaussians in the plane and one of forty in 64 dimensions, with exact scores,
and on a network trained on digits: the root mean square distance of samples from the tightly solved
probability flow, from the same states, in units of the data. The library's solvers run on their
default grid, `Heun` on EDM's and `DDIM` on `TangentGrid`. Those of diffusers, k-diffusion and
azula, where they are installed, run on the best of twelve published grids, chosen for each of them
and each number of evaluations on the draws that are judged. The numbers go to a JSON file, from
which the table and the picture can be made again.

    python benchmarks/solver_errors.py
    python benchmarks/solver_errors.py --draw
    python benchmarks/solver_errors.py --train-steps 100 --draws 16 --evaluations 6 8
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peers import k_diffusion_sampling
from torch import Tensor

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    IPNDM,
    LMS,
    DPMSolver2M,
    DPMSolver2S,
    DPMSolver3M,
    GaussianMixtureModel,
    Heun,
    KarrasGrid,
    PCSampler,
    Predictor,
    ProbabilityFlow,
    ScoreModel,
    TangentGrid,
    UniPC,
    VelocityAdams,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import load
from fitted_grids import mixture, published_grids, seeded
from guided_digits import train

DOCS = Path(__file__).parents[1] / "docs"
EVALUATIONS = (5, 6, 8, 10, 12, 15, 20, 30, 40)
OURS: dict[str, Predictor] = {
    "DDIM": DDIM(),
    "Heun": Heun(),
    "DPMSolver2S": DPMSolver2S(),
    "DPMSolver2M": DPMSolver2M(),
    "DPMSolver2M heun": DPMSolver2M("heun"),
    "DPMSolver3M": DPMSolver3M(),
    "UniPC 2": UniPC(),
    "UniPC 3": UniPC(3),
    "DEIS 3": DEIS(),
    "DEIS 4": DEIS(4),
    "LMS 4": LMS(),
    "IPNDM 3": IPNDM(3),
    "IPNDM 4": IPNDM(),
    "VelocityAdams 2": VelocityAdams(2),
    "VelocityAdams 3": VelocityAdams(),
}
GRIDS: dict[str, KarrasGrid | TangentGrid] = {
    "DDIM": TangentGrid(),
    "Heun": KarrasGrid(to_zero=True),
}  # others have a default
DATA = DOCS / "tables" / "solver_errors.json"
PICTURE = DOCS / "_static" / "solver_errors.png"

Released = Callable[[ScoreModel, Tensor, Tensor], Tensor]
Errors = dict[str, dict[str, float]]  # by solver and evaluations


def planar() -> GaussianMixtureModel:
    """Return three Gaussians in the plane, one of them narrow."""
    means = [[-1.0, 0.3], [0.8, -0.6], [0.5, 0.9]]
    return GaussianMixtureModel(EDMSDE(), means, [0.2, 0.35, 0.08], [0.3, 0.5, 0.2]).float()


def x0(model: ScoreModel, x: Tensor, sigma: float) -> Tensor:
    """Return the predicted data of states (n, d) at a noise level."""
    return model.predict(x, torch.full((len(x),), sigma, dtype=x.dtype)).x0


def diffusers_solver(name: str, **settings: Any) -> Released:
    """Return a scheduler's run on given noise levels, in flow-matching form: u = s / (1 + s)."""
    kind = getattr(import_module("diffusers"), name)
    make = kind(prediction_type="flow_prediction", use_flow_sigmas=True, **settings)

    def run(model: ScoreModel, x: Tensor, sigmas: Tensor) -> Tensor:
        u = sigmas / (1 + sigmas)
        make.set_timesteps(len(u) - 1)
        make.sigmas, make.timesteps = u, torch.arange(len(u) - 1, 0, -1)
        make.num_inference_steps = len(u) - 1
        x = x / (1 + sigmas[0])
        for k, t in enumerate(make.timesteps):
            state, sigma = x * (1 + sigmas[k]), float(sigmas[k])
            data = x0(model, state, sigma)
            x = make.step((state - data) / sigma - data, t, x).prev_sample
        return x * (1 + sigmas[-1])

    return run


def k_diffusion_solver(name: str, **settings: Any) -> Released:
    """Return one of k-diffusion's functions."""
    sampling = k_diffusion_sampling()
    if sampling is None:
        raise ImportError("k_diffusion is not installed")
    function = getattr(sampling, name)

    def run(model: ScoreModel, x: Tensor, sigmas: Tensor) -> Tensor:
        def denoiser(state: Tensor, sigma: Tensor) -> Tensor:
            return x0(model, state, float(sigma[0]))

        found: Tensor = function(denoiser, x, sigmas, disable=True, **settings)
        return found

    return run


def azula_solver(name: str, order: int) -> Released:
    """Return a sampler of azula's with a schedule that has the given levels at its times."""
    denoise, sample = import_module("azula.denoise"), import_module("azula.sample")

    class Denoiser(denoise.Denoiser):  # type: ignore[misc, name-defined]
        def __init__(self, model: ScoreModel, sigmas: Tensor) -> None:
            super().__init__()
            self.model, self.sigmas = model, sigmas

        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            n = len(self.sigmas) - 1
            sigma = self.sigmas[(n - (t * n)).round().long()]
            return torch.ones_like(sigma), sigma

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            sigma = float(self.schedule(t)[1])
            return denoise.DiracPosterior(mean=x0(self.model, x_t, sigma))

    def run(model: ScoreModel, x: Tensor, sigmas: Tensor) -> Tensor:
        made = Denoiser(model, sigmas)
        sampler = getattr(sample, name)(made, order=order, steps=len(sigmas) - 1, silent=True)
        found: Tensor = sampler(x)
        return found

    return run


def released() -> dict[str, Released]:
    """Return the released solvers that are installed."""
    wanted: dict[str, tuple[Callable[..., Released], dict[str, Any]]] = {
        "diffusers DPM++ 2M": (
            diffusers_solver, {"name": "DPMSolverMultistepScheduler", "solver_order": 2}),
        "diffusers DPM++ 3M": (
            diffusers_solver, {"name": "DPMSolverMultistepScheduler", "solver_order": 3}),
        "diffusers UniPC 2": (
            diffusers_solver, {"name": "UniPCMultistepScheduler", "solver_order": 2}),
        "diffusers UniPC 3": (
            diffusers_solver, {"name": "UniPCMultistepScheduler", "solver_order": 3}),
        "diffusers DEIS 3": (
            diffusers_solver, {"name": "DEISMultistepScheduler", "solver_order": 3}),
        "k-diffusion LMS 4": (k_diffusion_solver, {"name": "sample_lms"}),
        "azula vAB 3": (azula_solver, {"name": "vABSampler", "order": 3}),
    }  # fmt: skip
    found = {}
    for name, (make, settings) in wanted.items():
        try:
            found[name] = make(**settings)
        except ImportError:
            print(f"{name}: not installed", flush=True)
    return found


def measure(model: ScoreModel, features: int, draws: int, counts: Sequence[int]) -> Errors:
    """Return the errors of all solvers on a problem."""
    z = model.sde.prior_sample((draws, features), generator=seeded(100))
    exact = ProbabilityFlow(model, "dopri8", 1e-6, 1e-6).sample(z)

    def error(x: Tensor) -> float:
        value = float((x - exact).square().mean().sqrt())
        return value if math.isfinite(value) else math.inf

    found: Errors = {}
    for name, predictor in OURS.items():
        stages = 2 if isinstance(predictor, (Heun, DPMSolver2S)) else 1
        row = {}
        for n in counts:
            steps = (n + stages - 1) // stages
            row[str(n)] = error(PCSampler(model, predictor, grid=GRIDS.get(name), steps=steps)(z))
        found[name] = row
        print(f"  {name:<20}" + "".join(f"{e:>9.4f}" for e in row.values()), flush=True)
    with torch.no_grad():
        for name, run in released().items():
            row = {}
            for n in counts:
                row[str(n)] = min(error(run(model, z, grid.float())) for grid in published_grids(n))
            found[name] = row
            print(f"  {name:<20}" + "".join(f"{e:>9.4f}" for e in row.values()), flush=True)
    return found


def table(found: dict[str, Errors]) -> str:
    """Return the numbers as text."""
    lines = []
    for problem, errors in found.items():
        counts = list(next(iter(errors.values())))
        lines.append(f"{problem}\n{'evaluations':<20}" + "".join(f"{n:>9}" for n in counts))
        for name, row in errors.items():
            cells = (f"{row[n]:>9.4f}" if n in row else f"{'':>9}" for n in counts)
            lines.append(f"{name:<20}" + "".join(cells))
        lines.append("")
    return "```text\n" + "\n".join(lines).rstrip() + "\n```\n"


def draw(found: dict[str, Errors], path: Path) -> None:
    """Draw the errors against evaluations: the library's in color, released ones in gray."""
    names = {name: None for errors in found.values() for name in errors if name not in OURS}
    marks = dict(zip(names, "ov^<>sPX*Dd", strict=False))
    figure = Figure(figsize=(5 * len(found), 5.5), layout="constrained")
    for ax, (problem, errors) in zip(figure.subplots(1, len(found), squeeze=False)[0],
                                     found.items(), strict=True):  # fmt: skip
        for k, (name, row) in enumerate(errors.items()):
            points = [int(n) for n in row], list(row.values())
            if name in OURS:
                style = "-" if k < 10 else "--"
                ax.plot(*points, style, color=f"C{k % 10}", label=name, lw=1.2)
            else:
                ax.plot(*points, ls="", marker=marks[name], color="gray", ms=4, label=name)
        counts = [int(n) for n in next(iter(errors.values()))]
        ax.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="error", title=problem)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.minorticks_off()
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and save the numbers, the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--train-steps", type=int, default=3000)
    add("--draws", type=int, default=96, help="draws for the evaluation")
    add("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    add("--draw", action="store_true", help="only redraw the figure from saved numbers")
    add("--data", type=Path, default=DATA)
    add("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    if not args.draw:
        data = load()
        problems: dict[str, Callable[[], ScoreModel]] = {
            "Mixture in the plane": planar,
            "Mixture in 64 dimensions": lambda: mixture(data.train.flatten(1)),
            "Network trained on digits": lambda: train(data, args.train_steps, 0),
        }
        found = {}
        for name, make in problems.items():
            print(name, flush=True)
            features = 2 if make is planar else 64
            found[name] = measure(make(), features, args.draws, args.evaluations)
        text = json.dumps(found, indent=1)
        args.data.write_text(text + "\n")
    found = json.loads(args.data.read_text())
    args.data.with_suffix(".md").write_text(table(found))
    draw(found, args.picture)


if __name__ == "__main__":
    main()
