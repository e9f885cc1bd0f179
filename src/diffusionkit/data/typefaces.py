"""Glyphs: a real set of images that every machine with matplotlib has."""

from __future__ import annotations

import hashlib
import importlib
import os
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from .._checks import check_choice, check_count
from .._writing import atomic_write
from ._npz import Arrays, read_npz
from .images import ImageTensors

_STYLES = {
    "DejaVuSans": ("", "-Bold", "-BoldOblique", "-Oblique"),
    "DejaVuSansMono": ("", "-Bold", "-BoldOblique", "-Oblique"),
    "DejaVuSerif": ("", "-Bold", "-BoldItalic", "-Italic"),
    "STIXGeneral": ("", "Bol", "BolIta", "Italic"),
}
_TYPEFACES = tuple(family + style for family, styles in _STYLES.items() for style in styles)

# Classes by the first word of a character's Unicode name, else by its category.
_SCRIPTS = {
    **{name.upper(): name for name in ("Latin", "Greek", "Cyrillic", "Armenian", "Georgian")},
    **{name.upper(): name for name in ("Hebrew", "Arabic", "Lao", "Braille")},
    "CANADIAN": "Canadian syllabics",
    **dict.fromkeys(("COPTIC", "LISU", "NKO", "OGHAM", "OLD", "TIFINAGH"), "Other scripts"),
}
_KINDS = {
    **dict.fromkeys(("Lu", "Ll", "Lo"), "Letterlike signs"),
    "Nd": "Digits",
    "Sm": "Operators",
    "So": "Symbols",
}
_CLASSES = tuple(dict.fromkeys([*_SCRIPTS.values(), *_KINDS.values(), "Arrows"]))

_FORMAT = 1  # of the kept file


def glyphs(
    part: Literal["train", "test"] = "train",
    *,
    size: int = 32,
    labels: Literal["script", "typeface"] = "script",
) -> ImageTensors:
    """Return images of letters, digits and signs, drawn from the typefaces of matplotlib.

    White signs on black, one channel, antialiased, centered: 33,787 distinct images of 32 x 32 from
    16 typefaces (DejaVu Sans, Sans Mono and Serif, STIX General, each in four styles) and 6,500
    characters. Signs that are larger than the image are omitted, as are repeated images.

    About a tenth of the characters form the test set, chosen by a hash of the code point. No
    character is in both sets, in any style; characters that a typeface draws alike, such as the
    Latin, Greek and Cyrillic A, count as one.

    The first call draws all images, in several seconds. They are kept in the user's cache folder
    (`XDG_CACHE_HOME`, ~/.cache by default) where that can be written.

    Args:
        part: "train" or "test".
        size: the height and width of the images.
        labels: the classes: "script" for 16 scripts and kinds of signs, "typeface" for the
            16 typefaces. An image that several typefaces share has the label of the first.

    Raises:
        ValueError: if an argument has none of its values.
        TypeError: if size is not an integer.
        ImportError: if matplotlib is not installed.
    """
    check_choice("part", part, ["train", "test"])
    check_count(size, "size", least=8, most=256)
    check_choice("labels", labels, ["script", "typeface"])
    drawn = _kept(size)
    chosen = np.array([_is_test(code) == (part == "test") for code in drawn["groups"].tolist()])
    images = torch.from_numpy(drawn["images"][chosen])[:, None]
    if labels == "typeface":
        classes, indices = _TYPEFACES, drawn["typefaces"][chosen].tolist()
    else:
        classes = _CLASSES
        indices = [classes.index(_script(chr(code))) for code in drawn["codes"][chosen].tolist()]
    return ImageTensors(images, torch.tensor(indices), classes=classes)


def _is_test(code: int) -> bool:
    return hashlib.blake2b(str(code).encode(), digest_size=1).digest()[0] < 26  # of 256


def _script(character: str) -> str:
    name = unicodedata.name(character, "?")
    first = name.replace("-", " ").split()[0]  # ARABIC-INDIC
    if first in _SCRIPTS:
        return _SCRIPTS[first]
    arrow = "ARROW" in name or "HARPOON" in name
    return "Arrows" if arrow else _KINDS[unicodedata.category(character)]


def _kept(size: int) -> Arrays:
    """Return the drawn images from the cache folder, or draw and keep them."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        ft2font: Any = importlib.import_module("matplotlib.ft2font")
    except ImportError as error:
        raise ImportError(
            "glyphs needs matplotlib: pip install 'diffusionkit-torch[examples]'"
        ) from error
    versions = (matplotlib.__version__, ft2font.__freetype_version__, unicodedata.unidata_version)
    key = hashlib.blake2b(repr((_FORMAT, *versions)).encode(), digest_size=8).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(home).expanduser() / "diffusionkit" / f"glyphs-{size}-{key}.npz"
    try:
        return _read(path, size)
    except (OSError, ValueError):
        pass  # there is none, or a damaged one: each record of the file has a checksum
    drawn = _draw(Path(matplotlib.get_data_path()) / "fonts" / "ttf", ft2font.FT2Font, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: _write(file, drawn))
    except OSError:
        pass  # the next call draws them again
    return drawn


def _write(file: BinaryIO, drawn: Arrays) -> None:
    np.savez_compressed(file, allow_pickle=False, **drawn)


def _read(path: Path, size: int) -> Arrays:
    drawn = read_npz(path, ("images", "codes", "typefaces", "groups"))
    count = len(drawn["images"])
    shapes = [array.shape for array in drawn.values()]
    if shapes != [(count, size, size), (count,), (count,), (count,)]:
        raise ValueError(f"{path}: expected images of {size} x {size}, got shapes {shapes}")
    return drawn


def _draw(folder: Path, font_type: Any, size: int) -> Arrays:
    """Draw each character of each typeface once, and group those that look alike.

    Args:
        folder: the folder of the typefaces.
        font_type: the class `FT2Font`.
        size: the height and width of the images.

    Returns:
        images (N, size, size), and for each its code point, typeface and group: the least code
        point of the characters that a typeface draws alike.
    """
    first: dict[bytes, int] = {}
    alike: dict[int, int] = {}
    codes, typefaces = [], []
    for number, typeface in enumerate(_TYPEFACES):
        font = font_type(str(folder / f"{typeface}.ttf"))
        font.set_size(0.75 * size, 72)
        for code in sorted(font.get_charmap()):
            if unicodedata.category(chr(code)) not in _KINDS:
                continue
            font.set_text(chr(code), 0.0)
            font.draw_glyphs_to_bitmap(antialiased=True)
            image = _centered(np.asarray(font.get_image(), dtype=np.uint8), size)
            if image is None:
                continue
            alike.setdefault(code, code)
            if image in first:
                _join(alike, first[image], code)
                continue
            first[image] = code
            codes.append(code)
            typefaces.append(number)
    images = np.frombuffer(b"".join(first), dtype=np.uint8).reshape(-1, size, size)
    return {
        "images": images.copy(),
        "codes": np.array(codes),
        "typefaces": np.array(typefaces),
        "groups": np.array([_root(alike, code) for code in codes]),
    }


def _centered(bitmap: np.ndarray[Any, Any], size: int) -> bytes | None:
    """Return the pixels of a centered image, None for a sign that is too large or of one shade."""
    if not bitmap.size or max(bitmap.shape) > size:
        return None
    image = np.zeros((size, size), np.uint8)
    top, left = (size - bitmap.shape[0]) // 2, (size - bitmap.shape[1]) // 2
    image[top : top + bitmap.shape[0], left : left + bitmap.shape[1]] = bitmap
    return None if image.min() == image.max() else image.tobytes()


def _root(alike: dict[int, int], code: int) -> int:
    while alike[code] != code:
        code = alike[code]
    return code


def _join(alike: dict[int, int], one: int, other: int) -> None:
    low, high = sorted((_root(alike, one), _root(alike, other)))
    alike[high] = low
