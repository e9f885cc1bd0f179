"""The U-Net of Ho et al., 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from typing_extensions import override

from .config import remembers
from .embeddings import LabelEmbedding
from .ncsnpp import NCSNpp


class DDPMUNet(NCSNpp):
    r"""The U-Net of DDPM: NCSN++ with plain residual blocks and separate resampling layers.

    Maps :math:`(x, l) \mapsto F(x, l)` with F of the shape of x (or of `out_channels` channels).
    Close to zero at initialization. The default arguments are the CIFAR-10 network (35,218,947
    parameters for 3 channels). The noise label l should have the range of a step index, 0 to
    1000.

    Class methods build the published networks; their `options` replace the published ones.

    Args:
        channels: number of input channels.
        blocks: number of residual blocks per level.
        embedding: the embedding of the noise label, see `NCSNpp`.
        resblock: the kind of residual blocks, see `NCSNpp`.
        fir_kernel: one-dimensional FIR kernel of all resampling, or None to repeat entries and
            use strided convolutions.
        progressive_input: the input branch, see `NCSNpp`.
        skip_rescale: whether sums of two branches are divided by sqrt(2).
        group_channels: least number of channels per normalization group; there are at most
            32 groups. Use 4 below a width of 64: with one channel per group, normalization
            removes the noise embedding.
        scale_by_sigma: whether the output is divided by the noise level.
        **options: the other options of `NCSNpp`, with its defaults.

    Raises:
        TypeError: if a count is not an int or an option is unknown.
        ValueError: if an argument is out of range.

    Source: J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv
    2006.11239.

    >>> import torch
    >>> from diffusionkit.networks import DDPMUNet
    >>> net = DDPMUNet(channels=1, width=8, multipliers=(1, 2), blocks=1)
    >>> net(torch.randn(4, 1, 8, 12), torch.tensor([0, 10, 500, 999])).shape
    torch.Size([4, 1, 8, 12])
    """

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        blocks: int = 2,
        embedding: LabelEmbedding | None = "positional",
        resblock: Literal["biggan", "ddpm"] = "ddpm",
        fir_kernel: Sequence[float] | None = None,
        progressive_input: Literal["none", "input_skip", "residual"] = "none",
        skip_rescale: bool = False,
        group_channels: int = 1,
        scale_by_sigma: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            channels,
            blocks=blocks,
            embedding=embedding,
            resblock=resblock,
            fir_kernel=fir_kernel,
            progressive_input=progressive_input,
            skip_rescale=skip_rescale,
            group_channels=group_channels,
            scale_by_sigma=scale_by_sigma,
            **options,
        )

    @classmethod
    @override
    def cifar10(cls, **options: Any) -> Self:
        """Build the network for CIFAR-10, data in [-1, 1].

        35,218,947 parameters; noise label: the step, 0 to 999; output: the noise.
        """
        return cls(**options)

    @classmethod
    @override
    def celebahq_256(cls, **options: Any) -> Self:
        """Build the network for CelebA-HQ of 256 pixels, data in [-1, 1].

        Noise label: the step, 0 to 999; output: the noise.
        """
        published: dict[str, Any] = {
            "multipliers": (1, 1, 2, 2, 4, 4),
            "attention_levels": (4,),
            "dropout": 0.0,
        }
        return cls(**published | options)

    @classmethod
    @override
    def lsun_256(cls, **options: Any) -> Self:
        """Build the network for LSUN of 256 pixels, the same as `celebahq_256`."""
        return cls.celebahq_256(**options)
