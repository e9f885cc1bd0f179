"""Classes of image files: their sub-folders, or the labels of a dataset.json."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from ._pictures import SUFFIXES

TABLE = "dataset.json"
MOST_CLASSES = 2**20
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval"}
# Images that would be left out silently.
_UNREAD = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".ppm")

Labels = tuple[list[int] | None, tuple[str, ...]]


def pictures(path: str, files: Collection[str]) -> list[str]:
    """Return the names of the images among files, sorted.

    Raises:
        ValueError: if there are none, or some of a format that is not read.
    """
    for name in sorted(files):
        if name.lower().endswith(_UNREAD):
            raise ValueError(f"{path}: expected images in {', '.join(SUFFIXES)}, got {name!r}")
    # By code points: the same order on every machine.
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    if not names:
        raise ValueError(
            f"{path}: expected images in {', '.join(SUFFIXES)}, got {len(files)} other files"
        )
    return names


def folder_of_all(names: Sequence[str]) -> str:
    """Return the innermost folder of all files, "" or with a slash at its end."""
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "".join(part + "/" for part in first[:shared])


def by_folder(
    path: str, names: Sequence[str], files: Collection[str], folders: Sequence[str]
) -> Labels:
    """Return class labels and classes by the folders in the folder of all images.

    Args:
        path: the folder or zip file, for errors.
        names: the names of the images.
        files: the names of all files.
        folders: the names of all folders.

    Raises:
        ValueError: if some images are in sub-folders and some not, a sub-folder is empty, two
            have the same name in other code points, or they are training and test parts.
    """
    root = folder_of_all(names)
    tails = [name[len(root) :].split("/") for name in names]
    classes = tuple(sorted({tail[0] for tail in tails if len(tail) > 1}))
    filled = {name[: n + 1] for name in files for n, letter in enumerate(name) if letter == "/"}
    for folder in sorted(folders):
        above = folder[: folder.rfind("/") + 1]
        if root.startswith(above) and folder + "/" not in filled:
            raise ValueError(f"{path}: expected images in each sub-folder, got none in {folder!r}")
    if not classes:
        return None, ()
    for name, tail in zip(names, tails, strict=True):
        if len(tail) == 1:
            raise ValueError(
                f"{path}: expected all images in sub-folders, which are their classes, or none, "
                f"got {name!r} next to the folder {root + classes[0]!r}"
            )
    if {name.lower() for name in classes} <= _PARTS:
        raise ValueError(
            f"{path}: expected the folder of one part of the data, got {', '.join(classes)}"
        )
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise ValueError(f"{path}: expected distinct classes, got {other!a} and {name!a}")
    indices = {name: n for n, name in enumerate(classes)}
    return [indices[tail[0]] for tail in tails], classes


def by_table(path: str, table: bytes, root: str, names: Sequence[str]) -> Labels:
    """Return class labels and classes by the content of a dataset.json.

    Args:
        path: that file, for errors.
        table: its content, `{"labels": [["00000/img.png", 3], ...]}` or `{"labels": null}`.
        root: the folder that its names are relative to.
        names: the names of the images.

    Raises:
        ValueError: if it has another form, or names other images.
    """
    try:
        content: Any = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    pairs = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(pairs, list | None):
        raise ValueError(
            f'{path}: expected {{"labels": [[name, label], ...]}}, got {content!r:.80}'
        )
    if not pairs:
        return None, ()
    found: dict[str, int] = {}
    for pair in pairs:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and type(pair[1]) is int
            and 0 <= pair[1] < MOST_CLASSES
        ):
            raise ValueError(f"{path}: expected [name, class label >= 0], got {pair!r:.80}")
        name = root + pair[0].replace("\\", "/")
        if found.setdefault(name, pair[1]) != pair[1]:
            raise ValueError(
                f"{path}: expected one label of {pair[0]!r}, got {found[name]} and {pair[1]}"
            )
    known = set(names)
    for name in found:
        if name not in known:
            raise ValueError(f"{path}: expected labels of the images next to it, got {name!r}")
    for name in names:
        if name not in found:
            raise ValueError(f"{path}: expected a label of each image, got none of {name!r}")
    labels = [found[name] for name in names]
    return labels, tuple(str(n) for n in range(max(labels) + 1))
