"""Checks of the pictures that examples save."""

from pathlib import Path


def check_picture(path: Path, *others: str) -> None:
    """Check that a file is a PNG of a plausible size, alone in its folder but for other names."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    assert 1000 < width < 4000
    assert 400 < height < 4000
    assert path.stat().st_size > 20_000
    assert {file.name for file in path.parent.iterdir()} == {path.name, *others}
