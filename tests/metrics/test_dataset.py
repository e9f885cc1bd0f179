"""Features of data sets: in order, and equal in all digits for any number of processes."""

import pytest
import torch
from support.processes import run_in_processes
from torch import nn
from torch.utils.data import TensorDataset

from diffusionkit.metrics import gather_features, stream_features

IMAGES = torch.arange(10 * 3 * 2 * 2).view(10, 3, 2, 2).float()

PROGRAM = """
from torch.utils.data import TensorDataset
from diffusionkit.metrics import *

torch.manual_seed(0)
images = torch.randint(0, 256, (N, 3, 9, 9), dtype=torch.uint8)
network = features("random-network")
weight = torch.randn(360, 5)

def extractor(x):
    found = network(x)
    return found, found @ weight

data = TensorDataset(images, torch.arange(N))
found, logits = gather_features(data, extractor, batch_size=4, progress=False)
moments, scores = FeatureMoments(), InceptionScore(3)
for part, part_logits in stream_features(data, extractor, batch_size=4, progress=False):
    moments.update(part)
    scores.update(logits=part_logits)
quality = evaluate_samples(found, found.flip(0)[: N - 2] + 0.1, logits=logits[: N - 2], splits=2)

class Broken(list):
    def __getitem__(self, index):
        if index == 4:
            raise ValueError("4.png: expected an image, got an empty file")
        return super().__getitem__(index)

try:
    gather_features(Broken(images), extractor, batch_size=4, progress=False)
except Exception as error:
    told = f"{type(error).__name__}: {error}"
result = found, logits, moments.state_dict(), scores.compute(), quality.as_dict(), told
"""


def means(images):
    return images.mean((2, 3))


@pytest.mark.slow  # several processes
def test_all_digits_are_equal_at_1_2_and_3_processes(tmp_path):
    """Fourteen images in batches of four: a process has no batch in the last round."""
    program = "N = 14\n" + PROGRAM
    results = []
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        results += run_in_processes(world, program, folder)
    first = results[0]
    for other in results[1:]:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
        assert all(torch.equal(first[2][key], other[2][key]) for key in ("mean", "scatter"))
        assert first[3:5] == other[3:5]
    named = "ValueError: 4.png: expected an image, got an empty file"
    told = f"RuntimeError: process 1 of 2 failed: {named}"
    assert [result[5] for result in results[:3]] == [named, told, named]


def test_features_are_in_the_order_of_the_data():
    for data in (IMAGES, TensorDataset(IMAGES, torch.arange(10)), list(IMAGES)):
        batches = stream_features(data, means, batch_size=4, progress=False)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        found = gather_features(data, means, batch_size=3, progress=False)
        assert torch.equal(found, means(IMAGES))


def test_tuples_evaluation_mode_and_workers():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    found = gather_features(TensorDataset(IMAGES), module, workers=1, progress=False)
    assert torch.equal(found, IMAGES.flatten(1))
    assert module.training
    pair = gather_features(IMAGES, lambda x: (means(x), x.flatten(1)), batch_size=4)
    assert [tuple(part.shape) for part in pair] == [(10, 3), (10, 12)]


def test_bad_data_are_refused():
    with pytest.raises(ValueError, match="data: expected at least one image, got none"):
        stream_features(IMAGES[:0], means)
    with pytest.raises(TypeError, match="data: expected a data set with a length, got generator"):
        stream_features((x for x in IMAGES), means)
    images = [IMAGES[0], IMAGES[1, :, :1]]
    with pytest.raises(ValueError, match=r"images of one shape, got \(3, 1, 2\) and \(3, 2, 2\)"):
        gather_features(images, means, progress=False)
