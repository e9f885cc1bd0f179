"""At equal network evaluations, is predictor-corrector as good as the predictor alone?

    python examples/pc_vs_predictor.py
    python examples/pc_vs_predictor.py --sdes ve --evaluations 100 400 --repeats 8

Trains the digits model of `quickstart.py` for each process and samples it both ways. A step of
predictor-corrector evaluates the network twice, so it gets half the steps. The table, in markdown,
has the energy distance to the test digits (less is better) and the share of samples that a
classifier is confident of, each a mean over repeats with its standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from digits import SHAPE, Pixels, Quality, load, pixels
from helpers import count
from quickstart import SDES, TRAIN_STEPS, train
from tqdm import tqdm

from diffusionkit import (
    Ancestral,
    Corrector,
    Langevin,
    PCSampler,
    Predictor,
    ReverseDiffusion,
    ScoreModel,
)

PREDICTORS: dict[str, Predictor] = {
    "reverse diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
}
SNR = {"vp": 0.16, "subvp": 0.16, "ve": 0.16}


def samplers(
    model: ScoreModel, predictor: Predictor, corrector: Corrector, evaluations: int
) -> tuple[PCSampler, PCSampler]:
    """Return the predictor alone and with the corrector, at the same cost but for one."""
    budget = evaluations - 1  # the last one takes the remaining noise away
    return (
        PCSampler(model, predictor, steps=budget),
        PCSampler(model, predictor, corrector, steps=max(budget // 2, 1)),
    )


def repeated(sampler: PCSampler, samples: int, repeats: int) -> Iterator[Pixels]:
    """Yield as many draws, the same noise for every sampler."""
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        yield pixels(sampler((samples, *SHAPE), generator=generator))


def mean_and_error(values: Sequence[float], form: str) -> str:
    """Return the mean and its standard error as text."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):{form}} ± {error:{form}}"


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--sdes", choices=SDES, nargs="+", default=["vp", "ve"], help="the processes (vp ve)")
    add("--evaluations", type=positive_int, nargs="+", default=[50, 100, 200], help="(50 100 200)")
    add("--repeats", type=positive_int, default=3, help="draws to average over (%(default)s)")
    add("--samples", type=positive_int, default=200, help="images in a draw (%(default)s)")
    add("--train-steps", type=positive_int, default=TRAIN_STEPS, help="of training (%(default)s)")
    add("--seed", type=int, default=0, help="of the training (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.evaluations) < 3:
        parser.error(f"--evaluations: expected at least 3, got {min(args.evaluations)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw, and print the table."""
    args = options(argv)
    digits = load()
    quality = Quality(digits)
    measures: tuple[tuple[Callable[[Pixels], float], str], ...] = (
        (quality.energy_distance, ".4f"),
        (quality.confident, ".1%"),
    )
    lines = [
        "| process | predictor | evaluations | energy distance, predictor | with Langevin "
        "| confident, predictor | with Langevin |",
        "|---|---|---|---|---|---|---|",
    ]
    for sde in args.sdes:
        torch.manual_seed(args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        model, _ = train(SDES[sde](digits.train), digits.train, args.train_steps, generator)
        runs = list(product(PREDICTORS.items(), args.evaluations))
        for (name, predictor), evaluations in tqdm(runs, desc=f"sampling {sde}"):
            draws = [
                list(repeated(sampler, args.samples, args.repeats))
                for sampler in samplers(model, predictor, Langevin(snr=SNR[sde]), evaluations)
            ]
            cells = [
                mean_and_error([measure(draw) for draw in drawn], form)
                for measure, form in measures
                for drawn in draws
            ]
            lines.append(f"| {sde} | {name} | {evaluations} | " + " | ".join(cells) + " |")
    attainable = quality.attainable_energy_distance(args.samples)
    print("\n".join(lines))
    print(f"\nTraining digits have an energy distance of {attainable:.4f}, and test digits are "
          f"confidently classified in {quality.confident(quality.test):.1%} of cases.")  # fmt: skip


if __name__ == "__main__":
    main()
