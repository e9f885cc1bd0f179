"""Reference batches: their contents, their loading and their distribution."""

import itertools

import pytest
import torch
from torch.utils.data import TensorDataset

from diffusionkit import VPSDE, EpsModel, ScoreMatching
from diffusionkit.training.references import ReferenceBatches
from diffusionkit.training.stable_target import StableTarget


class Counting:
    """A data set of the numbers 0, 1, ... that counts how often each is loaded."""

    def __init__(self, n: int) -> None:
        self.loaded = [0] * n

    def __len__(self) -> int:
        return len(self.loaded)

    def __getitem__(self, i: int) -> torch.Tensor:
        self.loaded[i] += 1
        return torch.tensor([float(i)])


def numbers(pairs) -> list[tuple[list[float], list[float]]]:
    return [(batch.flatten().tolist(), pool.flatten().tolist()) for batch, pool in pairs]


@pytest.mark.parametrize(
    ("n", "batch", "reference"),
    [(40, 4, 16), (43, 4, 16), (43, 4, 18), (40, 8, 8), (20, 6, 20), (41, 8, 9)],
)
def test_an_epoch_uses_each_item_at_most_once(n, batch, reference) -> None:
    data = Counting(n)
    loader = ReferenceBatches(data, batch, reference)
    steps = numbers(loader)
    assert len(steps) == len(loader) == n // batch
    for part, pool in steps:
        assert len(part) == batch
        assert len(pool) == reference == len(set(pool))
        assert set(part) <= set(pool)
    seen = list(itertools.chain.from_iterable(part for part, _ in steps))
    assert len(seen) == len(set(seen))
    assert max(data.loaded) == 1
    # Consecutive windows differ by one batch at most.
    for (_, before), (_, after) in itertools.pairwise(steps):
        assert len(set(after) - set(before)) <= batch


def test_each_step_loads_only_its_new_items() -> None:
    data = Counting(40)
    pairs = iter(ReferenceBatches(data, 4, 16))
    assert sum(data.loaded) == 0
    loads = []
    for _ in pairs:
        loads.append(sum(data.loaded))
    assert loads == [16, 20, 24, 28, 32, 36, 40, 40, 40, 40]


def test_seed_and_epoch_determine_the_order() -> None:
    make = lambda seed=0: ReferenceBatches(torch.arange(30.0)[:, None], 5, 10, seed=seed)  # noqa: E731
    state = torch.get_rng_state()
    loader = make()
    first, second = numbers(loader), numbers(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert first != second
    assert numbers(make()) == first
    assert numbers(make(1)) != first
    again = make()
    again.set_epoch(1)
    assert numbers(again) == second


def test_ranks_use_disjoint_parts_of_the_data() -> None:
    data = torch.arange(43.0)[:, None]
    shares = []
    for rank in range(4):
        steps = numbers(ReferenceBatches(data, 3, 6, rank=rank, world_size=4))
        assert len(steps) == 3
        shares.append({x for _, pool in steps for x in pool})
    assert [len(share) for share in shares] == [10, 10, 10, 10]
    assert len(set.union(*shares)) == 40


def test_class_labels_stay_with_their_items() -> None:
    x = torch.arange(24.0)[:, None]
    class_labels = x.flatten().long() % 3
    for data in (TensorDataset(x, class_labels), list(zip(x, class_labels.tolist(), strict=True))):
        for (batch, labels), (pool, pool_labels) in ReferenceBatches(data, 4, 12):
            assert torch.equal(batch.flatten() % 3, labels.float())
            assert torch.equal(pool.flatten() % 3, pool_labels.float())
            model = EpsModel(lambda x, noise_label, class_labels: torch.zeros_like(x), VPSDE())
            objective = ScoreMatching(target=StableTarget())
            loss = objective(
                model,
                batch,
                class_labels=labels,
                reference=pool,
                reference_class_labels=pool_labels,
            )
            assert loss.shape == (4,)


def test_given_the_window_each_item_is_equally_likely_in_the_batch() -> None:
    """With five items, windows of three and batches of one, at each step of an epoch."""
    loader = ReferenceBatches(torch.arange(5.0)[:, None], 1, 3)
    counts: list[dict] = [{} for _ in range(5)]
    for _ in range(1500):
        for count, (batch, pool) in zip(counts, numbers(loader), strict=True):
            key = (tuple(sorted(pool)), batch[0])
            count[key] = count.get(key, 0) + 1
    for count in counts:
        assert len(count) == 30
        # Each of ten windows with each of its items: 50 +- 7, in 150 counts.
        assert min(count.values()) > 50 - 4 * 7
        assert max(count.values()) < 50 + 4 * 7


@pytest.mark.slow
def test_workers_do_not_change_the_batches() -> None:
    data = torch.arange(30.0)[:, None]
    options = {"num_workers": 2, "multiprocessing_context": "spawn"}
    helped = ReferenceBatches(data, 5, 10, **options)
    assert numbers(helped) == numbers(ReferenceBatches(data, 5, 10))


def test_invalid_arguments() -> None:
    data = torch.zeros(20, 3)
    for batch, reference in ((8, 4), (4, 21), (0, 4)):
        with pytest.raises(ValueError, match="expected"):
            ReferenceBatches(data, batch, reference)
    with pytest.raises(ValueError, match=r"reference_size <= 10, .* process, got 4, 11"):
        ReferenceBatches(data, 4, 11, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank: expected a number below 2, got 2"):
        ReferenceBatches(data, 4, 8, rank=2, world_size=2)
    with pytest.raises(TypeError, match="with a length, got generator"):
        ReferenceBatches((x for x in data), 4, 8)
    with pytest.raises(TypeError, match="batch_size: expected an integer"):
        ReferenceBatches(data, 4.0, 8)
    named = [{"x": torch.zeros(3)} for _ in range(20)]
    with pytest.raises(TypeError, match="tuples of tensors and numbers, got dict"):
        next(iter(ReferenceBatches(named, 4, 8)))


@pytest.mark.parametrize("n", [40, 43])
@pytest.mark.parametrize(("batch", "reference"), [(4, 12), (5, 5), (7, 40), (3, 13)])
def test_a_resumed_epoch_continues_bit_for_bit(n, batch, reference) -> None:
    """Wherever a run is interrupted, the rest has the same batches and references."""

    def make() -> ReferenceBatches:
        return ReferenceBatches(Counting(n), batch, reference, seed=3)

    source = make()
    whole = [*numbers(source), *numbers(source)]
    for taken in range(len(whole)):
        interrupted = make()
        flow = itertools.chain.from_iterable(itertools.repeat(interrupted))
        numbers(itertools.islice(flow, taken))
        resumed = make()
        resumed.load_state_dict(interrupted.state_dict())
        assert resumed.state_dict() == interrupted.state_dict()
        resumed.set_epoch(resumed.epoch)  # as loops over epochs do
        rest = [*numbers(resumed), *numbers(resumed)]
        assert rest[: len(whole) - taken] == whole[taken:]
        left = len(source) - taken % len(source)
        assert len(rest) == left + len(source)
        assert max(resumed.dataset.loaded) <= 2


def test_a_resumed_epoch_loads_only_what_it_uses() -> None:
    source = ReferenceBatches(Counting(100), batch_size=10, reference_size=30)
    source.load_state_dict(source.state_dict() | {"step": 5})
    next(iter(source))
    assert sum(source.dataset.loaded) == 30


def test_the_place_is_that_of_all_ranks() -> None:
    ranks = [ReferenceBatches(torch.arange(40.0), 2, 4, rank=r, world_size=2) for r in (0, 1)]
    numbers(itertools.islice(ranks[0], 3))
    fresh = ReferenceBatches(torch.arange(40.0), 2, 4, rank=1, world_size=2)
    fresh.load_state_dict(ranks[0].state_dict())
    assert numbers(fresh) == numbers(ranks[1])[3:]


def test_the_place_in_other_batches_is_refused() -> None:
    def make(n=40, batch=4, reference=8, **options) -> ReferenceBatches:
        return ReferenceBatches(torch.arange(float(n)), batch, reference, **options)

    source = make()
    good = source.state_dict()
    for other, message in (
        (make(seed=1), "seed: expected 0, got 1"),
        (make(n=41), "items: expected 40, got 41"),
        (make(batch=5), "batch_size: expected 4, got 5"),
        (make(reference=9), "reference_size: expected 8, got 9"),
        (make(rank=0, world_size=2), "world_size: expected 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            source.load_state_dict(other.state_dict())
    for change, error in (
        ({"step": 10}, ValueError),
        ({"step": -1}, ValueError),
        ({"step": 1.0}, TypeError),
        ({"epoch": True}, TypeError),
        ({"epoch": -1}, ValueError),
        ({"more": 1}, ValueError),
    ):
        with pytest.raises(error, match="expected"):
            source.load_state_dict(good | change)
    for wrong in ({}, None, [1]):
        with pytest.raises(ValueError, match="state: expected epoch, step, items"):
            source.load_state_dict(wrong)
    assert source.state_dict() == good
