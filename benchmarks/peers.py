"""Other libraries that benchmarks compare with ours, if they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any
from unittest.mock import patch


@functools.cache
def k_diffusion_sampling() -> Any:
    """Return k-diffusion's module of samplers, or None where it is not installed."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        return None
    package = types.ModuleType("k_diffusion")  # its own imports much that samplers do not use
    package.__path__ = list(spec.submodule_search_locations or ())
    images = "torchvision", "torchvision.transforms", "torchvision.transforms.functional"
    unused = {name: types.ModuleType(name) for name in images}
    with patch.dict(sys.modules, {"k_diffusion": package, **unused}):
        return importlib.import_module("k_diffusion.sampling")
