"""What tests of the fused operation share."""

from collections.abc import Iterator

import pytest

from diffusionkit.ops import _fused


@pytest.fixture(scope="module")
def launching_on_the_cpu() -> Iterator[None]:
    """Tensors on the CPU are those of a GPU to the fused operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "_is_on_gpu", lambda x: x.device.type == "cpu")
        patch.setattr(_fused, "_can_launch", lambda device: True)
        yield
