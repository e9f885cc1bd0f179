"""What the names and shapes in a score_sde file say about its network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .._files import CheckpointError

FIR = (1, 3, 3, 1)


@dataclass(frozen=True)
class _Module:
    """One entry of ``all_modules``: the shapes in it by the names in it."""

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
    # A resampling without weights has a number all the same.
    return [found.get(i, _Module()) for i in range(max(found, default=-1) + 1)]


def infer_options(path: object, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the options of NCSN++ off the names and shapes of its tensors.

    What leaves no trace is not in the answer: the FIR kernel where no filtered convolution has a
    name of its own, the rescaling of skips, the division by sigma, the range of the data.

    Args:
        path: File the tensors came from, for messages.
        tensors: Tensors by name, without ``sigmas``.

    Returns:
        Options of `NCSNpp`.

    Raises:
        CheckpointError: If the tensors are of no network of this kind.
    """
    try:
        if any(tensor.numel() == 0 for tensor in tensors.values()):
            raise ValueError("a tensor without elements")
        return _Reader(_modules(tensors)).options()
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: expected the tensors of an NCSN++, DDPM++ or DDPM of score_sde, got names or "
            "shapes that do not follow its order"
        ) from error


class _Reader:
    """Goes through the modules in the order of the forward pass."""

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
                self.found["fir_kernel"] = FIR
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
        # The first block of the decoder is the first that takes more than what came before it.
        while not (self.modules[self.at].is_block and self.modules[self.at].ins != c):
            module = self.modules[self.at]
            inside = module.is_block and "Conv_2.weight" in module and module.outs == c
            self.at += 1
            if module.is_attention:
                attentions[-1] += 1
            elif module.is_block and not inside:
                c = outs[-1] = module.outs
                blocks[-1] += 1
            else:  # a down-sampling: a block, a convolution or nothing
                if not module.is_block:
                    self.found["resample_with_conv"] = bool(module.shapes)
                c = self.input_branch(c)
                for counts, start in ((outs, c), (blocks, 0), (attentions, 0)):
                    counts.append(start)
        blocks[-1] -= 2  # those of the middle,
        attentions[-1] -= 1  # and its attention
        if len(set(blocks)) > 1:
            raise ValueError("levels of different numbers of blocks")
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
