"""Compare predictor-corrector with the predictor alone at equal network evaluations.

    python examples/pc_vs_predictor.py
    python examples/pc_vs_predictor.py --sdes ve --evaluations 100 400 --repeats 8

Trains the digits model of `quickstart.py` for each process and runs both samplers. A step of
predictor-corrector evaluates the network twice, so it gets half the steps. The Markdown table shows
the energy distance to the test digits (lower is better) and the share of confidently classified
samples: mean ± standard error over repeats.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from digits import SHAPE, Pixels, Quality, load, pixels
from helpers import argument_parser, mean_and_error, positive_int
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
    """Return samplers without and with the corrector, whose costs differ by at most one."""
    budget = evaluations - 1  # the last one is the denoising step
    return (
        PCSampler(model, predictor, steps=budget),
        PCSampler(model, predictor, corrector, steps=max(budget // 2, 1)),
    )


def repeated(sampler: PCSampler, samples: int, repeats: int) -> Iterator[Pixels]:
    """Yield a batch of samples per repeat, seeded alike for every sampler."""
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        yield pixels(sampler((samples, *SHAPE), generator=generator))


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--sdes", choices=SDES, nargs="+", default=["vp", "ve"], help="the processes")
    add("--evaluations", type=positive_int, nargs="+", default=[50, 100, 200], help="budgets")
    add("--repeats", type=positive_int, default=3, help="batches to average over")
    add("--samples", type=positive_int, default=200, help="images per batch")
    add("--train-steps", type=positive_int, default=TRAIN_STEPS, help="training steps")
    add("--seed", type=int, default=0, help="the training seed")
    args = parser.parse_args(argv)
    if min(args.evaluations) < 3:
        parser.error(f"--evaluations: expected at least 3, got {min(args.evaluations)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, and print the table."""
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
            batches = [
                list(repeated(sampler, args.samples, args.repeats))
                for sampler in samplers(model, predictor, Langevin(snr=SNR[sde]), evaluations)
            ]
            cells = [
                mean_and_error([measure(images) for images in repeats], form)
                for measure, form in measures
                for repeats in batches
            ]
            lines.append(f"| {sde} | {name} | {evaluations} | " + " | ".join(cells) + " |")
    attainable = quality.attainable_energy_distance(args.samples)
    print("\n".join(lines))
    print(f"\nTraining digits: energy distance {attainable:.4f}. "
          f"Test digits: {quality.confident(quality.test):.1%} confident.")  # fmt: skip


if __name__ == "__main__":
    main()
