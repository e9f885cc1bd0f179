"""All metrics at once, and results combined across processes."""

import dataclasses
import json

import pytest
import torch
from support import seeded
from support.processes import run_in_two_processes

from diffusionkit.metrics import (
    FeatureMoments,
    InceptionScore,
    all_gather,
    evaluate_samples,
    frechet_distance,
    kernel_distance,
    load_shards,
    precision_recall,
    sample_to_shards,
)


def normal(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed))


def test_all_metrics() -> None:
    real, fake, logits = normal(50), normal(40, seed=1) + 0.3, normal(40, 5, seed=2)
    found = evaluate_samples(real, fake, k=2, logits=logits, splits=4)
    score = InceptionScore(4)
    score.update(logits=logits)
    assert found.frechet == frechet_distance(real, fake)
    assert found.kernel == kernel_distance(real, fake)
    assert found.neighbors == precision_recall(real, fake, k=2)
    assert found.inception_score == score.compute()
    assert (found.real, found.fake) == (50, 40)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["frechet"] == found.frechet
    lines = str(found).splitlines()
    assert lines[0] == f"Frechet distance {found.frechet:.4f}"
    assert lines[2] == f"precision        {found.neighbors.precision:.4f}"
    assert lines[-2].startswith("Inception score  ")
    assert lines[-1] == "samples          40 generated, 50 real"
    without = evaluate_samples(real, fake)
    assert without.inception_score is None
    assert without.neighbors == precision_recall(real, fake, k=3)
    assert "Inception" not in str(without)


def test_bad_input() -> None:
    real, fake = normal(50), normal(40, seed=1)
    with pytest.raises(ValueError, match="logits: expected 40 rows, as in fake, got 30"):
        evaluate_samples(real, fake, logits=normal(30))
    with pytest.raises(ValueError, match="each of 50 splits, got 40"):
        evaluate_samples(real, fake, logits=normal(40), splits=50)
    with pytest.raises(ValueError, match="fake: expected at least 41 rows, got 40"):
        evaluate_samples(real, fake, k=40)
    with pytest.raises(ValueError, match="real: expected finite values, got 50 of 50 rows"):
        evaluate_samples(real * torch.nan, fake)


PROGRAM = """
import time
from diffusionkit.metrics import (
    FeatureMoments, InceptionScore, all_gather, load_shards, sample_to_shards)

x = torch.load(f"{folder}/x.pt")
mine = x[:30] if rank == 0 else x[30:]
moments, score = FeatureMoments(), InceptionScore(splits=4)
moments.update(mine)
score.update(logits=mine)
total = all_gather(moments), all_gather(score)


def draw(n, generators):
    time.sleep(0.2 * rank)  # the other process must wait before reading
    return torch.stack([torch.rand(2, 3, generator=g) for g in generators])


sample_to_shards(draw, 11, f"{folder}/shards", batch_size=2, progress=False)
result = {
    "images": torch.cat(list(load_shards(f"{folder}/shards"))),
    "rows": all_gather(mine),
    "moments": total[0].state_dict(),
    "score": total[1].compute(),
    "own": (moments.count, score.count),
    "empty": all_gather(moments if rank else FeatureMoments()).count,
}
"""


def draw(n: int, generators: list[torch.Generator]) -> torch.Tensor:
    return torch.stack([torch.rand(2, 3, generator=g) for g in generators])


def test_processes_combine_their_results(tmp_path) -> None:
    x = normal(50)
    torch.save(x, tmp_path / "x.pt")
    found = run_in_two_processes(PROGRAM, tmp_path)
    moments, score = FeatureMoments(), InceptionScore(splits=4)
    moments.update(x)
    score.update(logits=x)
    sample_to_shards(draw, 11, tmp_path / "alone", batch_size=4, progress=False)
    images = torch.cat(list(load_shards(tmp_path / "alone")))
    for rank, one in enumerate(found):
        assert torch.equal(one["rows"], x)
        assert torch.equal(one["images"], images)
        total = FeatureMoments()
        total.load_state_dict(one["moments"])
        assert total.count == 50
        torch.testing.assert_close(total.mean, moments.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total.covariance, moments.covariance, rtol=1e-12, atol=1e-12)
        assert one["score"] == pytest.approx(score.compute(), rel=1e-12)
        assert one["own"] == ((30, 30), (20, 20))[rank]
        assert one["empty"] == 20


def test_a_single_process_keeps_its_result() -> None:
    x, moments = normal(5), FeatureMoments()
    assert all_gather(x) is x
    assert all_gather(moments) is moments
