"""Decode image files to uint8 tensors of the wanted channels and size, or raise a clear error."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of Pillow
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_GREY = {"1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N"}
_COLOR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


class PictureError(ValueError):
    """An image that cannot be used; the message is the rest of "expected ..., got ..."."""


def check_pillow() -> None:
    """Raise ImportError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "open_images needs Pillow: pip install 'diffusionkit-torch[images]'"
        ) from error


def decoded(file: BinaryIO, channels: int | None, size: int | None) -> Tensor:
    """Return an image (C, H, W) in uint8 from an open file.

    Args:
        file: the file.
        channels: 1 or 3; None for 3 if the image has colors, else 1.
        size: the height and width to crop and scale to, None for those of the image.

    Raises:
        PictureError: if the file is damaged, or is no image of the formats and modes that are read.
    """
    # Only plugins that are imported are formats.
    from PIL import (
        BmpImagePlugin,  # noqa: F401
        Image,
        ImageOps,
        JpegImagePlugin,  # noqa: F401
        PngImagePlugin,  # noqa: F401
        UnidentifiedImageError,
        WebPImagePlugin,  # noqa: F401
    )

    with contextlib.ExitStack() as stack:
        try:
            image: Image.Image = stack.enter_context(Image.open(file, formats=FORMATS))
            # MPO is a JPEG file with more pictures behind the first, as cameras write it.
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                raise PictureError(f"one picture, got an animation of {frames}")
            image.load()
            image = ImageOps.exif_transpose(image)
        except PictureError:
            raise
        except UnidentifiedImageError as error:
            got = "another file" if file.seek(0, 2) else "an empty one"
            raise PictureError(f"an image in {', '.join(FORMATS)}, got {got}") from error
        except Image.DecompressionBombError as error:
            raise PictureError(f"an image of reasonable size, got {error}") from error
        # Damaged files make the decoders raise almost any exception.
        except Exception as error:
            raise PictureError(f"a whole image, got a damaged one: {error}") from error
        return _tensor(_resized(_plain(image, channels), size))


def from_array(array: np.ndarray[Any, Any], channels: int | None, size: int | None) -> Tensor:
    """Return an image (C, H, W) from an array (H, W, C) in uint8; see `decoded`."""
    from PIL import Image

    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    return _tensor(_resized(_plain(image, channels), size))


def _plain(image: Image, channels: int | None) -> Image:
    """Return an image in mode L or RGB."""
    if image.mode not in _GREY | _COLOR:
        raise PictureError(f"a gray or RGB image, got one of mode {image.mode}")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        if lowest != 255:
            raise PictureError(
                "an opaque image, got one with transparent pixels; put it on a background first"
            )
    grey = image.mode in _GREY
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    wanted = {None: "L" if grey else "RGB", 1: "L", 3: "RGB"}[channels]
    return image if image.mode == wanted else image.convert(wanted)


def _eight_bits(image: Image) -> Image:
    from PIL import Image as Module

    # Pillow's own conversion clips at 255. 65535 = 257 * 255.
    levels = np.asarray(image).astype(np.float64) / 257
    return Module.fromarray(levels.round().astype(np.uint8))


def _resized(image: Image, size: int | None) -> Image:
    """Return the largest square in the middle, scaled by Lanczos resampling."""
    from PIL.Image import Resampling

    if size is None or image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Resampling.LANCZOS)


def _tensor(image: Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
