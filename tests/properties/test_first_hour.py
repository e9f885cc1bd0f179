"""The mistakes of a first hour: each is refused with the line to write instead."""

import re

import numpy as np
import pytest
import torch
from support import seeded
from support.pretend_device import PretendDevice
from torch import nn

from diffusionkit import (
    DDIM,
    EDMSDE,
    NELBO,
    VPSDE,
    Ancestral,
    ClassifierFreeGuidance,
    EDMModel,
    EDMWeighting,
    EpsModel,
    GaussianMixtureModel,
    Inpainting,
    NoiseClassifier,
    ODELikelihood,
    PCSampler,
    ProbabilityFlow,
    ScoreMatching,
    StableTarget,
    classifier_loss,
)
from diffusionkit.data import Batch
from diffusionkit.metrics import FeatureMoments
from diffusionkit.networks import MLP, ADMUNet, DDPMpp, NCSNpp

SMALL = {"channels": 3, "width": 8, "multipliers": (1,), "blocks": 1}
X = 2 * torch.rand(4, 3, 8, 8, generator=seeded(0)) - 1
SHAPE = tuple(X.shape)
CLASSES = torch.tensor([0, 1, 2, 9])
PLAIN = EpsModel(DDPMpp(**SMALL), VPSDE())
CONDITIONAL = EpsModel(DDPMpp(**SMALL, num_classes=10), VPSDE())
EXACT = GaussianMixtureModel(VPSDE(), means=[[0.0, 1.0]], stds=[1.0])
LOSS = ScoreMatching()
SAMPLER = PCSampler(PLAIN, DDIM(), steps=1)
LABELLED = PCSampler(CONDITIONAL, DDIM(), steps=1)
PAIR = "of 2: a tensor of shape (4, 3, 8, 8), a tensor of shape (4,); unpack what a loader yields"
ONE_EACH = "; pass one for each sample: class_labels"
NUMPY = "got ndarray; pass torch.from_numpy(x).float()"

MISTAKES = {
    # batches
    "a loader's pair": (lambda: LOSS(PLAIN, [X, CLASSES]), f"got list {PAIR}"),
    "a loader's tuple": (lambda: LOSS(PLAIN, (X, CLASSES)), f"got tuple {PAIR}"),
    "a dictionary": (
        lambda: LOSS(PLAIN, {"image": X, "label": 1}),
        "pass one of its entries, batch['image']",
    ),
    "a list of images": (lambda: LOSS(PLAIN, list(X)), "; pass torch.stack(batch)"),
    "numpy": (lambda: LOSS(PLAIN, X.numpy()), NUMPY),
    "8 bits": (lambda: LOSS(PLAIN, (X * 127).to(torch.uint8)), "by x / 127.5 - 1 or"),
    "integers": (lambda: LOSS(PLAIN, X.long()), "; convert it by x.float()"),
    "channels last": (lambda: LOSS(PLAIN, X.permute(0, 2, 3, 1)), "by x.permute(0, 3, 1, 2)"),
    "one image": (lambda: LOSS(PLAIN, X[0]), "; add the batch by x.unsqueeze(0)"),
    "a pair for a likelihood": (lambda: ODELikelihood(EXACT)([X, CLASSES]), PAIR),
    "a pair for a bound": (lambda: NELBO(EXACT)((X, CLASSES)), PAIR),
    "a pair to encode": (lambda: ProbabilityFlow(EXACT).encode([X, CLASSES]), PAIR),
    "a pair to edit": (lambda: SAMPLER.edit([X, CLASSES], 0.5), PAIR),
    "a pair that is known": (lambda: Inpainting([X, CLASSES], torch.ones(4)), PAIR),
    "a pair of references": (
        lambda: ScoreMatching(target=StableTarget())(PLAIN, X, reference=[X, CLASSES]),
        PAIR,
    ),
    "a pair for a metric": (lambda: FeatureMoments().update([X, CLASSES]), PAIR),
    "a pair for a network": (lambda: DDPMpp(**SMALL)([X, CLASSES], torch.ones(4)), PAIR),
    # states of samplers
    "a number of samples": (
        lambda: SAMPLER(16),
        "got int 16; pass the shape of the samples, such as",
    ),
    "num_samples=": (
        lambda: SAMPLER(num_samples=16),
        "start: expected an argument of PCSampler(start",
    ),
    "a batch of EndlessBatches": (
        lambda: LOSS(CONDITIONAL, Batch(X.to(torch.uint8), CLASSES, CLASSES)),
        "got Batch; pass its images, scaled: batch.images / 127.5 - 1",
    ),
    "images as a shape": (lambda: SAMPLER(list(X)), "got list of 4: a tensor of shape (3, 8, 8)"),
    "a numpy state": (lambda: SAMPLER(X.numpy()), NUMPY),
    "a state in 8 bits": (lambda: SAMPLER(X.to(torch.uint8)), "convert 8-bit images"),
    "a state without values": (
        lambda: SAMPLER(X.to("meta")),
        "x: expected real numbers, got a meta",
    ),
    # class labels
    "a class": (lambda: LABELLED(SHAPE, class_labels=3), f"{ONE_EACH}=torch.full((4,), 3)"),
    "one-hot": (
        lambda: LOSS(CONDITIONAL, X, class_labels=torch.eye(10)[CLASSES]),
        "by class_labels.argmax(1)",
    ),
    "a column": (
        lambda: LOSS(CONDITIONAL, X, class_labels=CLASSES[:, None]),
        "by class_labels.squeeze(1)",
    ),
    "floats": (
        lambda: LOSS(CONDITIONAL, X, class_labels=CLASSES.float()),
        "by class_labels.long()",
    ),
    "short integers": (
        lambda: LOSS(CONDITIONAL, X, class_labels=CLASSES.int()),
        "by class_labels.long()",
    ),
    "a list of classes": (
        lambda: LOSS(CONDITIONAL, X, class_labels=[0, 1, 2, 3]),
        "; pass torch.as_tensor(",
    ),
    "counted from 1": (
        lambda: LOSS(CONDITIONAL, X, class_labels=CLASSES + 1),
        "; count classes from 0",
    ),
    "no class more": (
        lambda: LOSS(CONDITIONAL, X, class_labels=CLASSES.clamp_min(10)),
        "num_classes=11, is",
    ),
    "none": (lambda: LOSS(CONDITIONAL, X), "; pass class_labels=torch.tensor([...]), one for each"),
    "none to sample": (
        lambda: LABELLED(SHAPE),
        "; pass class_labels=torch.tensor([...]), one for each",
    ),
    "unasked": (
        lambda: LOSS(PLAIN, X, class_labels=CLASSES),
        "; make the network with num_classes=...",
    ),
    "y=": (
        lambda: LOSS(CONDITIONAL, X, y=CLASSES),
        "y: expected a condition of the network DDPMpp, one of class_labels",
    ),
    "labels=": (lambda: LABELLED(SHAPE, labels=CLASSES), "got labels=...; use class_labels=..."),
    "label=": (lambda: LABELLED(SHAPE, label=CLASSES), "got label=...; use class_labels=..."),
    "guidance without a null class": (
        lambda: PCSampler(ClassifierFreeGuidance(CONDITIONAL, 2.0), DDIM(), steps=1)(
            SHAPE, class_labels=CLASSES
        ),
        "null: expected the class that stands for no class, for a network with num_classes=10, got",
    ),
    "a class for a classifier": (
        lambda: classifier_loss(
            NoiseClassifier(MLP(2, out_features=3), VPSDE()), VPSDE(), torch.zeros(4, 2), 3
        ),
        f"{ONE_EACH}=torch.full((4,), 3)",
    ),
    # keywords
    "seed=": (lambda: SAMPLER(SHAPE, seed=0), "; pass generator=torch.Generator().manual_seed(0)"),
    "seed= of an exact model": (
        lambda: PCSampler(EXACT, DDIM(), steps=1)((2, 2), seed=0),
        "pass generator=torch.Generator()",
    ),
    "generator=0": (
        lambda: SAMPLER(SHAPE, generator=7),
        "got int; pass generator=torch.Generator().manual_seed(7)",
    ),
    "num_steps=": (
        lambda: PCSampler(PLAIN, DDIM(), num_steps=3),
        "got an unknown name; use steps=...",
    ),
    "num_inference_steps= of a call": (
        lambda: SAMPLER(SHAPE, num_inference_steps=3),
        "; pass steps=50 where the sampler is made",
    ),
    "guidance_scale=": (
        lambda: SAMPLER(SHAPE, guidance_scale=3.0),
        "; pass ClassifierFreeGuidance(model, scale=3.0)",
    ),
    "eta=": (lambda: SAMPLER(SHAPE, eta=0.3), "; pass DDIM(eta=0.5) as the predictor"),
    "an unknown word": (
        lambda: SAMPLER(SHAPE, colour=3),
        "start, generator, device and dtype, or an objective's, are conditions",
    ),
    "no process": (
        lambda: EpsModel(DDPMpp(**SMALL)),
        "sde: expected an argument of EpsModel(network, sde, ",
    ),
    # parts
    "a class of predictors": (
        lambda: PCSampler(PLAIN, Ancestral),
        "; pass an instance, Ancestral(...)",
    ),
    "a name of a predictor": (
        lambda: PCSampler(PLAIN, "ddim"),
        "got the string 'ddim'; pass an instance of a Predictor",
    ),
    "a class of weightings": (
        lambda: ScoreMatching(EDMWeighting),
        "; pass an instance, EDMWeighting(...)",
    ),
    "a number as a time": (lambda: PLAIN.predict(X, 0.5), "; pass torch.full((4,), 0.5)"),
    "one time": (lambda: PLAIN.predict(X, torch.tensor(0.5)), "; pass t.expand(4)"),
    # networks
    "a learned variance": (
        lambda: LOSS(EpsModel(ADMUNet(**SMALL), VPSDE()), X),
        'pass the model variance="learned_range"',
    ),
    "no learned variance": (
        lambda: LOSS(EpsModel(DDPMpp(**SMALL), VPSDE(), variance="learned"), X),
        "or the model with variance=None",
    ),
    "a label without logarithm": (
        lambda: EDMModel(NCSNpp(**SMALL), EDMSDE()),
        'embedding="positional" and scale_by_sigma=False',
    ),
    "an output over the label": (
        lambda: EpsModel(NCSNpp(**SMALL), VPSDE()),
        "make it with scale_by_sigma=False",
    ),
    "a level too many": (
        lambda: DDPMpp(**SMALL, attention_levels=(1,)),
        "got 1; there is one level for each of multipliers=(1,)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_the_line_to_write(name) -> None:
    call, message = MISTAKES[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        call()
    assert re.match(r"\w+: expected ", str(error.value)), error.value
    assert "got" in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("cls", [DDPMpp, ADMUNet, NCSNpp])
def test_networks_of_few_levels_attend_where_they_can(cls) -> None:
    for count in (1, 2):
        network = cls(1, width=8, multipliers=(1,) * count, blocks=1)
        assert network.config["attention_levels"] == (() if count == 1 else (1,))
    assert cls(1, width=8, multipliers=(1, 1), blocks=1, attention_levels=()).config[
        "attention_levels"
    ] == ()  # fmt: skip


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((), torch.nan))

    def forward(self, x, noise_label):
        return self.factor * x


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_samples_that_are_nan_are_refused_on_every_device(kind) -> None:
    """Arguments are not read there: a run would wait. A result is, at the end, once."""
    with PretendDevice(kind) as device:
        model = EpsModel(Broken(), VPSDE()).to(kind)
        x = torch.zeros(3, 2, device=kind)
        for run in (
            lambda: PCSampler(model, DDIM(), steps=2)((3, 2), device=kind),
            lambda: PCSampler(model, DDIM(), steps=2, denoise=False)(x),
            lambda: PCSampler(model, DDIM(), steps=2).edit(x, 0.9),
        ):
            with pytest.raises(ValueError, match="samples: expected finite values, got NaN or inf"):
                run()
        good = PCSampler(EpsModel(lambda x, noise_label: x, VPSDE()), DDIM(), steps=2)
        good(x)
        with device.watched() as events:
            good(x)
    reads = {line: n for (what, _, line), n in events.items() if what == "read"}
    assert [n for line, n in reads.items() if line.startswith("_checks")] == [1]


def test_numpy_labels_are_named() -> None:
    with pytest.raises(TypeError, match=r"got ndarray; pass torch\.as_tensor"):
        LABELLED(SHAPE, class_labels=np.zeros(4, np.int64))
