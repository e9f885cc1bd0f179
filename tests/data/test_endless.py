"""Batches without an end: their order, at any number of ranks, and their references."""

import itertools
import math
import pickle
from collections import Counter

import pytest
import torch

from diffusionkit.data import Batch, EndlessBatches, ImageTensors


def numbered(count: int, *, classes: int = 5) -> ImageTensors:
    """Images whose left pixels are their number: (n // 256, n % 256), unlike from both sides."""
    n = torch.arange(count)
    images = torch.zeros(count, 1, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = n // 256, n % 256
    images[:, 0, :, 2] = 255
    names = [f"class {i}" for i in range(classes)]
    return ImageTensors(images, n % classes if classes else None, classes=names)


def number_and_flip(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flipped = images[:, 0, 0, 0] == 255
    own = torch.where(flipped[:, None, None], images[:, 0].flip(-1), images[:, 0])[..., 0].long()
    return own[:, 0] * 256 + own[:, 1], flipped


def first(batches: EndlessBatches, steps: int) -> list[Batch]:
    return list(itertools.islice(batches, steps))


def test_each_epoch_has_every_item_once_in_another_order() -> None:
    batches = first(EndlessBatches(numbered(30), 7, seed=3), 13)
    order, _ = number_and_flip(torch.cat([b.images for b in batches]))
    positions = torch.cat([b.positions for b in batches])
    assert torch.equal(positions, torch.arange(91))
    epochs = order[:90].reshape(3, 30)
    assert torch.equal(epochs.sort().values, torch.arange(30).expand(3, 30))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_class_labels_and_flips_belong_to_their_images() -> None:
    source = EndlessBatches(numbered(40), 8, flip=True, reference_size=12)
    flips = []
    for batch in first(source, 20):
        items, flipped = number_and_flip(batch.images)
        expected = source.items(batch.positions)
        assert torch.equal(items, expected[0])
        assert torch.equal(flipped, expected[1])
        assert torch.equal(batch.class_labels, items % 5)
        in_reference, _ = number_and_flip(batch.reference)
        assert torch.equal(batch.reference_class_labels, in_reference % 5)
        flips.append(flipped)
    assert 50 < torch.cat(flips).sum() < 110  # of 160


@pytest.mark.parametrize("reference_size", [0, 14])
def test_ranks_share_the_batch_of_one_process(reference_size) -> None:
    data = numbered(50)
    options = {"seed": 1, "flip": True, "reference_size": reference_size}
    alone = first(EndlessBatches(data, 12, **options), 9)
    for world in (2, 3, 4, 6):
        ranks = [
            first(EndlessBatches(data, 12, rank=r, world_size=world, **options), 9)
            for r in range(world)
        ]
        for step, whole in enumerate(alone):
            shares = [batches[step] for batches in ranks]
            for name in ("images", "class_labels", "positions"):
                together = torch.cat([getattr(share, name) for share in shares])
                assert torch.equal(together, getattr(whole, name)), name
            for share in shares if reference_size else []:
                assert torch.equal(share.reference, whole.reference)
                assert torch.equal(share.reference_class_labels, whole.reference_class_labels)


@pytest.mark.parametrize("reference_size", [0, 11])
def test_a_run_continues_at_any_step(reference_size) -> None:
    data, options = numbered(40), {"flip": True, "reference_size": reference_size}
    whole = first(EndlessBatches(data, 10, **options), 14)
    for start in (1, 4, 11):
        for old, new in zip(
            whole[start:], first(EndlessBatches(data, 10, start=start, **options), 3), strict=False
        ):
            assert torch.equal(old.images, new.images)
            assert torch.equal(old.positions, new.positions)
            assert not reference_size or torch.equal(old.reference, new.reference)


def test_a_late_step_needs_no_earlier_one() -> None:
    batch = first(EndlessBatches(numbered(30), 6, start=10**15, reference_size=8), 1)[0]
    assert batch.positions[0] == 6 * 10**15


def test_workers_load_the_same_batches() -> None:
    data = numbered(40)
    for options in ({"flip": True}, {"flip": True, "reference_size": 12}):
        alone = first(EndlessBatches(data, 8, **options), 7)
        new_batches = first(EndlessBatches(data, 8, workers=2, **options), 7)
        for old, new in zip(alone, new_batches, strict=True):
            assert torch.equal(old.images, new.images)
            assert torch.equal(old.class_labels, new.class_labels)


def test_references_hold_the_batch_first_and_no_item_twice() -> None:
    """Also where the reference, or the batch, begins in one epoch and ends in the next."""
    for batch in first(EndlessBatches(numbered(40), 7, reference_size=13), 60):
        items, _ = number_and_flip(batch.reference)
        assert len(items.unique()) == 13
        assert torch.equal(batch.reference[:7], batch.images)


@pytest.mark.parametrize(("count", "size", "among", "step"), [(6, 1, 2, 5), (9, 2, 3, 4)])
def test_given_its_reference_each_item_is_in_the_batch_equally_often(count, size, among, step):
    """All orders of any items are equally likely, in references that reach into a next epoch."""
    data, seeds = numbered(count, classes=0), 500
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(seeds):
        source = EndlessBatches(data, size, seed=seed, reference_size=among)
        begin = step * size
        seen[tuple(source.items(torch.arange(begin, begin + among))[0].tolist())] += 1
    orders = list(itertools.permutations(range(count), among))
    assert sum(seen[order] for order in orders) == seeds
    expected = seeds / len(orders)
    chi2 = sum((seen[order] - expected) ** 2 / expected for order in orders)
    degrees = len(orders) - 1
    assert abs(chi2 - degrees) < 5 * math.sqrt(2 * degrees)


def test_data_without_classes_give_no_class_labels() -> None:
    batch = first(EndlessBatches(numbered(30, classes=0), 4, reference_size=8), 1)[0]
    assert batch.class_labels is None
    assert batch.reference_class_labels is None
    assert first(EndlessBatches(numbered(30), 4), 1)[0].reference is None


def test_the_state_of_torch_is_left_alone() -> None:
    state = torch.get_rng_state()
    first(EndlessBatches(numbered(30), 4, flip=True, reference_size=8), 9)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_move_to_a_device_without_their_positions() -> None:
    batch = first(EndlessBatches(numbered(30), 4, reference_size=8), 1)[0].to("meta")
    assert batch.images.is_meta
    assert batch.class_labels.is_meta
    assert batch.reference.is_meta
    assert batch.positions.tolist() == [0, 1, 2, 3]


def test_sizes_must_fit() -> None:
    data = numbered(30)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes"):
        EndlessBatches(data, 3, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank: expected an integer < 2, got 2"):
        EndlessBatches(data, 4, rank=2, world_size=2)
    for size in (3, 11):
        with pytest.raises(ValueError, match=r"reference_size: expected 0 or 4 .* to 10 "):
            EndlessBatches(data, 4, reference_size=size)
    with pytest.raises(ValueError, match=r"positions: expected .* >= 0, got \[-1\]"):
        EndlessBatches(data, 4).items(torch.tensor([-1]))


def test_batches_can_be_pickled() -> None:
    source = EndlessBatches(numbered(30), 4, seed=5)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(first(copy, 1)[0].images, first(source, 1)[0].images)
