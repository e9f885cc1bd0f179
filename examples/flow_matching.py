"""Flow matching: straighter flows by couplings and reflow, and digits compared with VP and EDM.

First a network learns to transport noise to eight modes in the plane, from independent pairs of
data and noise, from optimal-transport pairs within each batch, and from the pairs that the first
network generates (reflow); the flows are compared by their straightness and by samples with few
steps. Then one network is trained on scikit-learn's digits as a flow, as VP and as EDM at equal
cost. It prints tables and saves a picture, `outputs/flow_matching.png`. Runtime: ten minutes on one
CPU core; the second command takes a few seconds.

    python examples/flow_matching.py
    python examples/flow_matching.py --train-steps 20 --seeds 1 --samples 200
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from digits import Quality, load, pixels
from helpers import (
    argument_parser,
    energy_distance,
    fit,
    mean_and_error,
    picture_path,
    positive_int,
    save,
)
from matplotlib.figure import Figure
from torch import Tensor

from diffusionkit import (
    EDMSDE,
    VPSDE,
    EDMModel,
    EDMWeighting,
    Euler,
    FlowMatchingSDE,
    LogitNormalTimes,
    LogNormalTimes,
    LogSNRGrid,
    PCSampler,
    ScoreMatching,
    StratifiedTimes,
    UniformGrid,
    UniPC,
    VelocityModel,
    VelocityWeighting,
    VModel,
    optimal_coupling,
)
from diffusionkit.interfaces import ScoreModel
from diffusionkit.networks import MLP

SDE = FlowMatchingSDE()
OBJECTIVE = ScoreMatching(VelocityWeighting())
BATCH = 256
FEW = (1, 2, 4, 8)  # steps of Euler's method
EVALUATIONS = 15, 30, 60  # of a network, on digits
Pairs = Callable[[], tuple[Tensor, Tensor]]


def ring(n: int, generator: torch.Generator) -> Tensor:
    """Return n points of eight Gaussians on a circle, (n, 2)."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    noise = 0.1 * torch.randn(n, 2, generator=generator)
    return 1.5 * torch.stack([angle.cos(), angle.sin()], 1) + noise


def euler(model: ScoreModel, steps: int) -> PCSampler:
    """Return Euler's method from t = 1 to 0."""
    grid = UniformGrid(t_end=0.0)
    return PCSampler(model, Euler(), steps=steps, grid=grid, denoise=False)


def flow(pairs: Pairs, steps: int, name: str) -> VelocityModel:
    """Return a model trained on pairs of data and noise."""
    model = VelocityModel(MLP(2), SDE)

    def loss() -> Tensor:
        x0, eps = pairs()
        return OBJECTIVE(model, x0, eps=eps)

    fit(model, loss, steps, lr=2e-3, ema_decay=0.99, name=name)
    return model.eval()


def three_flows(steps: int, seed: int) -> dict[str, VelocityModel]:
    """Train on independent pairs, on coupled ones, and on those that the first model makes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def independent() -> tuple[Tensor, Tensor]:
        return ring(BATCH, generator), torch.randn(BATCH, 2, generator=generator)

    def coupled() -> tuple[Tensor, Tensor]:
        x0, eps = independent()
        return x0, optimal_coupling(x0, eps)

    first = flow(independent, steps, "independent pairs")
    noise = torch.randn(min(64, steps) * BATCH, 2, generator=generator)
    made = euler(first, 100)(noise)

    def reflow() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(noise), (BATCH,), generator=generator)
        return made[rows], noise[rows]

    return {
        "independent": first,
        "optimal transport": flow(coupled, steps, "optimal transport"),
        "reflow": flow(reflow, steps, "reflow"),
    }


@torch.no_grad()
def straightness(model: VelocityModel, noise: Tensor) -> float:
    """Return the mean of |u - (eps - x0)|^2 along the flow from eps to x0; 0 for a straight one."""
    states = [noise]
    times = torch.linspace(1.0, 0.0, 101)
    velocities = []
    for t, s in pairwise(times):
        prediction = model.predict(states[-1], t.expand(len(noise)))
        velocities.append(prediction.eps - prediction.x0)
        states.append(states[-1] + (s - t) * velocities[-1])
    chord = noise - states[-1]
    return float(torch.stack([(u - chord).square().sum(1) for u in velocities]).mean())


def in_the_plane(steps: int, seeds: int, samples: int) -> dict[str, VelocityModel]:
    """Print the straightness of the flows, and the energy distance of samples of few steps."""
    found: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        flows = three_flows(steps, seed)
        generator = torch.Generator().manual_seed(100 + seed)
        data, noise = ring(samples, generator), torch.randn(samples, 2, generator=generator)
        for name, model in flows.items():
            row = [straightness(model, noise)]
            row += [energy_distance(euler(model, n)(noise), data) for n in FEW]
            found.setdefault(name, []).append(row)
    head = [f"{n} step{'s' if n > 1 else ''}" for n in FEW]
    print(f"{'energy distance':20}" + "".join(f"{cell:>18}" for cell in ["curvature", *head]))
    for name, rows in found.items():
        cells = [mean_and_error(column, ".4f") for column in zip(*rows, strict=True)]
        print(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    return flows


def picture(flows: dict[str, VelocityModel]) -> Figure:
    """Return a figure of trajectories and of samples in one step."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1500, 2, generator=generator)
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for (top, bottom), (name, model) in zip(axes.T, flows.items(), strict=True):
        paths = [state.x for state in euler(model, 50).iterate(noise[:60])]
        top.plot(*torch.stack(paths).permute(2, 0, 1).numpy(), color="C0", linewidth=0.7)
        top.set(title=name, aspect="equal", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
        one = euler(model, 1)(noise)
        bottom.plot(*one.T.numpy(), ".", markersize=2, rasterized=True)
        bottom.set(aspect="equal")
    axes[0, 0].set(ylabel="trajectories")
    axes[1, 0].set(ylabel="samples in one step")
    return figure


def on_digits(steps: int, seeds: int, samples: int) -> None:
    """Print the energy distance of digits for three processes and a few numbers of evaluations."""
    digits = load()
    quality, data = Quality(digits), digits.train.flatten(1)
    std = float(data.std())
    found: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        cases = {
            "VP": (
                VModel(MLP(64), VPSDE()),
                ScoreMatching(EDMWeighting(1.0), times=StratifiedTimes()),
            ),
            "EDM": (
                EDMModel(MLP(64), EDMSDE(), std),
                ScoreMatching(EDMWeighting(std), times=LogNormalTimes()),
            ),
            "flow matching": (
                VelocityModel(MLP(64), SDE),
                ScoreMatching(VelocityWeighting(), times=LogitNormalTimes()),
            ),
        }
        for name, (model, objective) in cases.items():
            rows = torch.Generator().manual_seed(seed)

            def loss(
                model: ScoreModel = model,
                objective: ScoreMatching = objective,
                rows: torch.Generator = rows,
            ) -> Tensor:
                return objective(model, data[torch.randint(len(data), (BATCH,), generator=rows)])

            fit(model, loss, steps, lr=2e-3, ema_decay=0.995, name=name)
            model.eval()
            row = []
            for n in EVALUATIONS:
                sampler = PCSampler(model, UniPC(), steps=n - 1, grid=LogSNRGrid())
                x = sampler((samples, 64), generator=torch.Generator().manual_seed(seed))
                row.append(quality.energy_distance(pixels(x.view(-1, 1, 8, 8))))
            found.setdefault(name, []).append(row)
    print(f"\n{'digits':20}" + "".join(f"{n:>14} eval." for n in EVALUATIONS))
    for name, values in found.items():
        cells = [mean_and_error(column, ".4f") for column in zip(*values, strict=True)]
        print(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'real digits':20}{quality.attainable_energy_distance(samples):>20.4f}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argument_parser(__doc__)
    found.add_argument("--train-steps", type=positive_int, default=800, help="steps per network")
    found.add_argument("--seeds", type=positive_int, default=3, help="training runs of each kind")
    found.add_argument("--samples", type=positive_int, default=2000, help="points in the plane")
    found.add_argument(
        "--output",
        type=picture_path,
        default="outputs/flow_matching.png",
        help="path of the figure",
    )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the tables and save the picture."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)  # the networks are small
    flows = in_the_plane(options.train_steps, options.seeds, options.samples)
    save(picture(flows), options.output)
    on_digits(options.train_steps, options.seeds, max(20, options.samples // 4))


if __name__ == "__main__":
    main()
