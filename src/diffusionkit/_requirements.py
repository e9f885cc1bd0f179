"""Checks of the environment, made when the package is first imported."""

from __future__ import annotations

import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

TORCH = (2, 6)
"""The lowest torch, as in pyproject.toml."""

_CURE = (
    "a project of another author with the same import name; the two cannot share an environment: "
    "`pip uninstall diffusionkit diffusionkit-torch`, then install diffusionkit-torch again"
)


def check_torch(found: str) -> None:
    """Raise ImportError if a version of torch is too old. Builds before a release count as it."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and (int(numbers[1]), int(numbers[2])) < TORCH:
        lowest = ".".join(map(str, TORCH))
        raise ImportError(
            f"torch: diffusionkit expected version {lowest} or newer, got {found}; "
            f'upgrade it with `pip install "torch>={lowest}"`'
        )


def check_project(package: ModuleType) -> None:
    """Raise ImportError if the package is another project's, warn if that is installed too.

    The distribution `diffusionkit` is such a project. If it was installed last, the package is its
    own, and modules of ours lie beside it.
    """
    try:
        other = f"diffusionkit {version('diffusionkit')}"
    except PackageNotFoundError:
        other = None
    if getattr(package, "__project__", None) != "diffusionkit-torch":
        # Uninstalling the other project deletes our __init__.py.
        where = package.__file__ or "a folder without __init__.py"
        raise ImportError(
            f"diffusionkit: expected the package of diffusionkit-torch, got {where}, of "
            f"{other or 'diffusionkit, now uninstalled'}, {_CURE}"
        )
    if other:
        warnings.warn(
            f"diffusionkit: expected diffusionkit-torch alone, got {other} in the same "
            f"environment, {_CURE}",
            RuntimeWarning,
            stacklevel=2,
        )


check_torch(torch.__version__)
check_project(sys.modules["diffusionkit"])
