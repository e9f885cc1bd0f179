"""Samples in files: seeds, processes, interrupted runs and rounding."""

import json
import math
import random

import numpy as np
import pytest
import torch

from diffusionkit.metrics import load_shards, sample_to_shards, to_uint8


def draw(n: int, generators: list[torch.Generator]) -> torch.Tensor:
    assert len(generators) == n
    return torch.stack([2 * torch.rand(3, 4, 4, generator=g) - 1 for g in generators])


def sample(folder, **options) -> torch.Tensor:
    sample_to_shards(draw, 21, folder, **{"batch_size": 5, "progress": False} | options)
    return torch.cat(list(load_shards(folder)))


def test_a_sample_depends_only_on_the_seed_and_its_index(tmp_path) -> None:
    whole = sample(tmp_path / "a")
    assert whole.shape == (21, 3, 4, 4)
    assert whole.dtype == torch.uint8
    assert len({row.numpy().tobytes() for row in whole}) == 21
    assert torch.equal(sample(tmp_path / "b", batch_size=8), whole)
    assert not torch.equal(sample(tmp_path / "c", seed=1), whole)
    for rank in (2, 0, 1):
        arguments = {"batch_size": 4, "rank": rank, "world_size": 3, "progress": False}
        sample_to_shards(draw, 21, tmp_path / "d", **arguments)
        assert len(list((tmp_path / "d").glob("*.npy"))) == {2: 2, 0: 4, 1: 6}[rank]
    assert torch.equal(torch.cat(list(load_shards(tmp_path / "d"))), whole)
    sample_to_shards(draw, 8, tmp_path / "e", batch_size=8, progress=False)
    assert torch.equal(torch.cat(list(load_shards(tmp_path / "e"))), whole[:8])


def test_an_interrupted_run_resumes(tmp_path) -> None:
    whole, calls = sample(tmp_path / "whole"), []

    def stopped(n, generators):
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(n, generators)

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sample_to_shards(stopped, 21, folder, batch_size=5, progress=False)
    with pytest.raises(ValueError, match=r"expected 5 .* got 3 missing .* first 00000010\.npy"):
        load_shards(folder)
    done = sorted(folder.glob("*.npy"))
    times = [file.stat().st_mtime_ns for file in done]
    done[1].write_bytes(done[1].read_bytes()[:-1])  # a truncated file
    (folder / "00000010.npy").write_bytes(b"")
    shown = []
    arguments = {"batch_size": 5, "progress": lambda items: shown.extend(items) or items}
    sample_to_shards(stopped, 21, folder, **arguments)
    assert calls == [5, 5, 5, 5, 5, 5, 1]
    assert len(shown) == 4
    assert done[0].stat().st_mtime_ns == times[0]
    assert torch.equal(torch.cat(list(load_shards(folder))), whole)
    assert {file.suffix for file in folder.iterdir()} == {".npy", ".json"}


def test_a_larger_count_adds_samples(tmp_path) -> None:
    whole, calls = sample(tmp_path / "whole"), []
    folder = tmp_path / "run"
    sample_to_shards(draw, 12, folder, batch_size=5, progress=False)
    times = [(folder / f"{start:08d}.npy").stat().st_mtime_ns for start in (0, 5)]

    def counted(n, generators):
        calls.append(n)
        return draw(n, generators)

    for _ in range(2):
        sample_to_shards(counted, 21, folder, batch_size=5, progress=False)
        assert calls == [5, 5, 1]  # the last shard of the smaller run is redrawn
        assert torch.equal(torch.cat(list(load_shards(folder))), whole)
    assert times == [(folder / f"{start:08d}.npy").stat().st_mtime_ns for start in (0, 5)]


def test_other_settings_are_rejected(tmp_path) -> None:
    about = {"checkpoint": "a.pt", "grid": (1, 2)}
    whole = sample(tmp_path, settings=about)
    assert torch.equal(sample(tmp_path, settings=about), whole)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["settings"] == {"checkpoint": "a.pt", "grid": [1, 2]}
    for other in (
        {"seed": 1},
        {"batch_size": 4},
        {"data_range": (0.0, 1.0)},
        {"settings": {"checkpoint": "b.pt"}},
        {"settings": None},
    ):
        with pytest.raises(ValueError, match=r"settings: expected .* as saved in"):
            sample(tmp_path, **{"settings": about} | other)
    with pytest.raises(ValueError, match=r"count: expected at least the 21 samples of .* got 20"):
        sample_to_shards(draw, 20, tmp_path, batch_size=5, settings=about)
    with pytest.raises(ValueError, match=r"settings: expected .* as saved in"):
        sample_to_shards(draw, 22, tmp_path, batch_size=5, seed=1, settings=about)
    assert json.loads((tmp_path / "settings.json").read_text()) == kept
    assert torch.equal(torch.cat(list(load_shards(tmp_path))), whole)


def test_samples_need_not_be_images(tmp_path) -> None:
    def constant(n, generators):
        assert not torch.is_grad_enabled()
        return torch.full((n, 2), 0.5)

    sample_to_shards(constant, 3, tmp_path, data_range=(0.0, 1.0), progress=False)
    assert torch.equal(*load_shards(tmp_path), torch.full((3, 2), 128, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-3.0, 0.5)])
def test_all_levels_are_recovered(low, high, dtype) -> None:
    levels = torch.arange(256)
    ends = low + (high - low) * levels.to(dtype) / 255
    centers = low + (high - low) * (levels.to(dtype) + 0.5) / 256
    for x in (ends, centers, ends + 0.49 * (high - low) / 255):
        assert torch.equal(to_uint8(x, (low, high)), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([low - 9, high + 9]), (low, high)).tolist() == [0, 255]


def test_reduced_precision() -> None:
    """Scaling in bfloat16 would round again: its significand has only 8 bits."""
    x = torch.linspace(-1, 1, 200).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.double()))


def test_bad_samples(tmp_path) -> None:
    x = torch.zeros(4, 3, 2, 2)
    x[1, 0, 0, 0], x[2] = math.nan, math.inf
    with pytest.raises(ValueError, match="got 2 of 4 with NaN or infinity"):
        to_uint8(x.contiguous(memory_format=torch.channels_last))
    with pytest.raises(TypeError, match="floating-point"):
        to_uint8(x.int())
    for wrong in ((1.0, 1.0), (1.0, -1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="finite low < high"):
            to_uint8(x, wrong)
    with pytest.raises(TypeError, match=r"expected a pair \(low, high\), got float"):
        to_uint8(x, 1.0)
    with pytest.raises(ValueError, match=r"expected a pair \(low, high\), got \(0, 1, 2\)"):
        to_uint8(x, (0, 1, 2))
    for number, (found, error, message) in enumerate(
        [
            (x, ValueError, "2 of 4 with NaN"),
            (x[:3], ValueError, r"expected 4 samples \(4, \*D\), got \(3, 3, 2, 2\)"),
            ([x], ValueError, "got list"),
            (x.long(), TypeError, "floating-point"),
        ]
    ):
        folder = tmp_path / str(number)
        with pytest.raises(error, match=message):
            sample_to_shards(lambda n, g, found=found: found, 4, folder, progress=False)
        assert list(folder.glob("*.npy")) == []


def test_bad_numbers(tmp_path) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"rank": 2, "world_size": 2}, "rank: expected a number below 2, got 2"),
        ({"rank": -1}, "rank: expected an integer >= 0"),
        ({"data_range": (1.0, 0.0)}, "finite low < high"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_to_shards(draw, 4, tmp_path / "none", **options)
    for settings, message in (
        ([("steps", 3)], "settings: expected a mapping, got list"),
        ({"a": math.nan}, r"settings: expected JSON values, got {'a': nan}"),
        ({"a": torch.zeros(2)}, r"settings: expected JSON values, got {'a': tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            sample_to_shards(draw, 4, tmp_path / "none", settings=settings)
    with pytest.raises(ValueError, match="count: expected an integer >= 1"):
        sample_to_shards(draw, 0, tmp_path / "none")
    with pytest.raises(TypeError, match="draw: expected a callable"):
        sample_to_shards(None, 4, tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_shards(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_flipped_bit_is_noticed_and_its_file_drawn_again(tmp_path) -> None:
    whole, bits = sample(tmp_path), random.Random(0)
    files = sorted(tmp_path.glob("*.npy"))
    for number, file in enumerate(files, 1):
        good = file.read_bytes()
        for position in [*range(0, len(good), 37), *range(len(good) - 20, len(good))]:
            bad = bytearray(good)
            bad[position] ^= 1 << bits.randrange(8)
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=f"got {number} missing or damaged, first 00"):
                load_shards(tmp_path)
    assert torch.equal(sample(tmp_path), whole)


def test_files_are_readable_by_numpy(tmp_path) -> None:
    whole = sample(tmp_path)
    for mode in (None, "r"):
        arrays = [np.load(file, mmap_mode=mode) for file in sorted(tmp_path.glob("*.npy"))]
        assert np.array_equal(np.concatenate(arrays), whole.numpy())


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "a damaged file: "),
        (b"{", "a damaged file: "),
        (b"\xff\xfe\x00", "a damaged file: "),
        (b"[" * 100_000, "a damaged file: "),
        (b"[1, 2]", "list"),
        (b"null", "NoneType"),
        (b"{}", r"\[\]"),
        (b'{"count": 21}', r"\['count'\]"),
        ({"count": "21"}, "count: expected an integer, got str"),
        ({"count": -3}, "count: expected an integer >= 1, got -3"),
        ({"count": True}, "count: expected an integer, got bool"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected an integer, got float"),
        ({"seed": None}, "seed: expected an integer, got NoneType"),
        ({"data_range": [1, -1]}, "data_range: expected finite low < high"),
        ({"data_range": "ab"}, "data_range: expected a pair"),
    ],
    ids=str,
)
def test_damaged_settings_are_errors_in_words(tmp_path, content, got) -> None:
    sample(tmp_path)
    file = tmp_path / "settings.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_bytes()) | content).encode()
    file.write_bytes(content)
    match = rf"directory: expected {file} as written by sample_to_shards, got {got}"
    for use in (load_shards, sample):
        with pytest.raises(ValueError, match=match) as caught:
            use(tmp_path)
        assert type(caught.value) is ValueError
    assert file.read_bytes() == content


def test_a_huge_count_makes_no_list(tmp_path) -> None:
    sample(tmp_path)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"count": 10**15}))
    with pytest.raises(ValueError, match=r"expected 2\d* complete files .* first 00000020\.npy"):
        load_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no samples in .*: settings\.json is missing"):
        load_shards(tmp_path / "none")
