"""Stage 2 of `load_score_sde` without a configuration: the network inferred from its weights."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .._files import CheckpointError
from ..networks import NCSNpp, NCSNv2
from ..networks.ncsnv2 import LEVELS_64, LEVELS_128, LEVELS_256

logger = logging.getLogger(__name__)

_FIR = (1, 3, 3, 1)


def infer_network(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], sigmas: Sequence[float]
) -> NCSNpp | NCSNv2:
    """Build the network that weights belong to.

    Options that leave no trace in names and shapes - the FIR kernel where no filtered
    convolution has weights, the rescaling of skips, the division by sigma, the range of the
    data - are those of the published networks of the same kind; a warning lists them.

    Args:
        path: the file, for messages.
        tensors: the weights by name, without ``sigmas``.
        sigmas: the noise levels, the largest first.

    Raises:
        CheckpointError: if the weights belong to no network of score_sde.
    """
    try:
        if "begin_conv.weight" in tensors:
            return _ncsnv2(tensors, sigmas)
        return _ncsnpp(path, tensors)
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: expected the tensors of an NCSN++, DDPM++, DDPM or NCSNv2 of score_sde, got "
            f"other names or shapes ({type(error).__name__}: {error})"
        ) from error


def _ncsnv2(tensors: Mapping[str, Tensor], sigmas: Sequence[float]) -> NCSNv2:
    width, channels = tensors["begin_conv.weight"].shape[:2]
    count = sum(f"res{i}.0.conv1.weight" in tensors for i in (1, 2, 3, 31, 4, 5))
    levels = {4: LEVELS_64, 5: LEVELS_128, 6: LEVELS_256}.get(count)
    if levels is None:
        raise ValueError(f"expected an NCSNv2 of 4 to 6 levels, got {count}")
    options: dict[str, Any] = {"channels": channels, "width": width, "data_range": (0.0, 1.0)}
    return NCSNv2(levels=levels, sigmas=tuple(sigmas), **options)


def _ncsnpp(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> NCSNpp:
    if any(tensor.numel() == 0 for tensor in tensors.values()):
        raise ValueError("expected tensors with elements, got an empty one")
    options = _Reader(_modules(tensors)).options()
    fourier, ddpm = options["embedding"] == "fourier", options["resblock"] == "ddpm"
    # The options of the published networks of this kind.
    assumed: dict[str, Any] = {
        "fir_kernel": _FIR if fourier or options["progressive_input"] == "input_skip" else None,
        "skip_rescale": not ddpm,
        "group_channels": 1 if ddpm and not fourier else 4,
        "scale_by_sigma": fourier,
        "data_range": (0.0, 1.0) if fourier else (-1.0, 1.0),
    }
    logger.warning(
        "%s: the file does not determine the process that its network was trained for; assumed %s "
        "at all times and %s. To be sure, pass the configuration, by name if it is a published "
        "one, such as 've/cifar10_ncsnpp_continuous'",
        path,
        "VE" if fourier else "VP",
        {key: value for key, value in assumed.items() if key not in options},
    )
    return NCSNpp(**assumed | options)


@dataclass(frozen=True)
class _Module:
    """An entry of ``all_modules``: shapes by names."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    @property
    def is_block(self) -> bool:
        return "Conv_1.weight" in self

    @property
    def is_attention(self) -> bool:
        return "NIN_3.W" in self

    @property
    def is_pointwise(self) -> bool:
        return set(self.shapes.get("Conv_0.weight", ())[2:]) == {1}

    @property
    def outs(self) -> int:
        return self.shapes["Conv_0.weight"][0]

    @property
    def ins(self) -> int:
        return self.shapes["Conv_0.weight"][1]


def _modules(tensors: Mapping[str, Tensor]) -> list[_Module]:
    found: dict[int, _Module] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", key)
        if match:
            module = found.setdefault(int(match[1]), _Module())
            module.shapes[match[2]] = tuple(tensor.shape)
    # A resampling without weights has a number too.
    return [found.get(i, _Module()) for i in range(max(found, default=-1) + 1)]


class _Reader:
    """A walk over the modules in the order of the forward pass."""

    def __init__(self, modules: list[_Module]) -> None:
        self.modules = modules
        self.at = 0
        blocks = [module for module in modules if module.is_block]
        self.biggan = not any("NIN_0.W" in module for module in blocks)
        self.found: dict[str, Any] = {
            "resblock": "biggan" if self.biggan else "ddpm",
            "progressive_input": "none",
        }
        for module in modules:
            if "Conv2d_0.weight" in module:
                self.found["fir_kernel"] = _FIR
            elif "Conv_0.weight" in module and not (module.is_block or module.is_pointwise):
                self.found["fir_kernel"] = None

    def options(self) -> dict[str, Any]:
        modules = self.modules
        embedding = "fourier" if "W" in modules[0] else "positional"
        self.at = 1 if embedding == "fourier" else 0
        conditional = len(modules[self.at].shapes["weight"]) == 2
        self.at += 2 if conditional else 0
        width, channels, *kernel = modules[self.at].shapes["weight"]
        self.found |= {
            "channels": channels,
            "dims": len(kernel),
            "width": width,
            "embedding": embedding if conditional else None,
        }
        self.at += 1
        self.encoder(width)
        self.decoder(channels)
        return self.found

    def encoder(self, width: int) -> None:
        c = width
        outs, blocks, attentions = [c], [0], [0]
        # The decoder starts at the first block with more input channels than the output before it.
        while not (self.modules[self.at].is_block and self.modules[self.at].ins != c):
            module = self.modules[self.at]
            inside = module.is_block and "Conv_2.weight" in module and module.outs == c
            self.at += 1
            if module.is_attention:
                attentions[-1] += 1
            elif module.is_block and not inside:
                c = outs[-1] = module.outs
                blocks[-1] += 1
            else:  # a downsampling: a block, a convolution or nothing
                if not module.is_block:
                    self.found["resample_with_conv"] = bool(module.shapes)
                c = self.input_branch(c)
                for counts, start in ((outs, c), (blocks, 0), (attentions, 0)):
                    counts.append(start)
        blocks[-1] -= 2  # the middle blocks
        attentions[-1] -= 1  # and their attention
        if len(set(blocks)) > 1:
            raise ValueError("expected levels with equal numbers of blocks")
        self.found |= {
            "blocks": blocks[0],
            "multipliers": tuple(out // width for out in outs),
            "attention_levels": tuple(i for i, count in enumerate(attentions) if count),
        }

    def input_branch(self, c: int) -> int:
        module = self.modules[self.at]
        if module.is_block or not {"Conv_0.weight", "Conv2d_0.weight"} & set(module.shapes):
            return c
        self.at += 1
        if not module.is_pointwise:
            self.found["progressive_input"] = "residual"
            return c
        cat = self.modules[self.at].ins == 2 * c
        self.found["progressive_input"] = "input_skip"
        self.found["progressive_combine"] = "cat" if cat else "sum"
        return 2 * c if cat else c

    def decoder(self, channels: int) -> None:
        self.at += self.found["blocks"] + 1
        self.at += self.modules[self.at].is_attention
        module = self.modules[self.at]
        self.found["progressive"] = "none"
        if len(module.shapes.get("weight", ())) == 1 and self.at + 2 < len(self.modules):
            out = self.modules[self.at + 1].shapes["weight"][0]
            self.found["progressive"] = "output_skip" if out == channels else "residual"
