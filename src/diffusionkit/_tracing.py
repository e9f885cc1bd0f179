"""Whether a call is traced: by a compiler, or by a transform of torch.func such as vmap.

Then values cannot be read, and nothing may be kept or attached to tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# torch has no public function for it, as it has `torch.compiler.is_compiling`.
transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active


def traced() -> bool:
    """Return whether tensors are those of a compiler or of a transform of torch.func."""
    return torch.compiler.is_compiling() or transformed()
