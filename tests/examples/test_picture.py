"""The picture of real, generated and nearest images."""

import torch

from diffusionkit.data import open_images, save_images


def test_nearest_images_of_copies_are_the_copies(program, tmp_path, monkeypatch):
    picture = program("picture")
    noise = torch.Generator().manual_seed(0)
    train = torch.randint(256, (20, 1, 16, 16), generator=noise, dtype=torch.uint8)
    save_images(train, tmp_path / "train.npz")
    save_images(train[[3, 7, 5]], tmp_path / "samples.zip")
    drawn = []
    grid = picture.grid
    monkeypatch.setattr(picture, "grid", lambda images: drawn.append(images) or grid(images))
    picture.main([str(tmp_path / "samples.zip"), "--data", str(tmp_path / "train.npz"),
                  "--out", str(tmp_path / "new" / "picture.png")])  # fmt: skip
    assert torch.equal(drawn[1], train[[3, 7, 5]])
    assert torch.equal(drawn[2], train[[3, 7, 5]])
    assert open_images(tmp_path / "new").shape[0] >= 3


def test_few_images_leave_no_empty_rows(program):
    images = torch.full((10, 3, 16, 16), 255, dtype=torch.uint8)
    drawn = program("picture").grid(images)
    assert drawn.shape == (2 * 18, 8 * 18, 3)
    assert drawn[18:, : 2 * 18].any()
    assert not drawn[18:, 2 * 18 :].any()
