"""Where the programs' images come from: files of a user, or a built-in set with a test part."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from color_patches import color_patches

from diffusionkit.data import ImageData, glyphs, open_images

BUILT_IN = ("glyphs", "color-patches")
HELP = 'a folder, .zip, .npz, "glyphs" or "color-patches"'


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End a program by a line with its name, not by a trace, where its arguments are wrong."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"{program}: {error}") from error


def open_source(
    source: str,
    part: Literal["train", "test"],
    *,
    size: int,
    channels: int | None,
    labels: Literal["script", "typeface"] = "script",
) -> ImageData:
    """Return the images of a source; only built-in sets have parts.

    Args:
        source: a folder, .zip or .npz, or one of `BUILT_IN`.
        part: the part of a built-in set.
        size: the height and width of the images.
        channels: the channels to convert files to, or None; built-in sets have their own.
        labels: the classes of glyphs.
    """
    if source == "glyphs":
        return glyphs(part, size=size, labels=labels)
    if source == "color-patches":
        return color_patches(part, size)
    return open_images(source, size=size, channels=channels)


def held_out(source: str | None, given: str | None) -> str | None:
    """Return the source of held-out images: the given one, or the test part of a built-in set."""
    return source if given is None and source in BUILT_IN else given
