"""DDPM++, the U-Net of the variance-preserving models of Song et al., 2021."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from typing_extensions import override

from .config import remembers
from .embeddings import LabelEmbedding
from .ncsnpp import NCSNpp


class DDPMpp(NCSNpp):
    r"""DDPM++: NCSN++ without filters, without an input branch and with a positional embedding.

    Maps :math:`(x, l) \mapsto F(x, l)` with F of the shape of x (or of `out_channels` channels).
    Close to zero at initialization. The default arguments are the CIFAR-10 network (61,804,419
    parameters for 3 channels); ``blocks=8`` is the deep one (106,632,579).

    The noise label l is embedded by frequencies from 1 down to 1e-4: it should have the range
    of a step index, for example 999 t.

    Class methods build the published networks; their `options` replace the published ones.

    Args:
        channels: number of input channels.
        embedding: the embedding of the noise label, see `NCSNpp`.
        fir_kernel: one-dimensional FIR kernel of all resampling, or None to repeat entries and
            take means.
        progressive_input: the input branch, see `NCSNpp`.
        scale_by_sigma: whether the output is divided by the noise level.
        **options: the other options of `NCSNpp`, with its defaults.

    Raises:
        TypeError: if a count is not an int or an option is unknown.
        ValueError: if an argument is out of range.

    Source: Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based
    Generative Modeling through Stochastic Differential Equations, 2021, arXiv 2011.13456.

    >>> import torch
    >>> from diffusionkit.networks import DDPMpp
    >>> net = DDPMpp(channels=1, width=8, multipliers=(1, 2), blocks=1)
    >>> x, t = torch.randn(4, 1, 8, 12), torch.rand(4)
    >>> net(x, 999 * t).shape
    torch.Size([4, 1, 8, 12])
    """

    @remembers
    def __init__(
        self,
        channels: int = 3,
        *,
        embedding: LabelEmbedding | None = "positional",
        fir_kernel: Sequence[float] | None = None,
        progressive_input: Literal["none", "input_skip", "residual"] = "none",
        scale_by_sigma: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            channels,
            embedding=embedding,
            fir_kernel=fir_kernel,
            progressive_input=progressive_input,
            scale_by_sigma=scale_by_sigma,
            **options,
        )

    @classmethod
    @override
    def cifar10(cls, *, deep: bool = False, **options: Any) -> Self:
        """Build the network for CIFAR-10 and the VP or sub-VP process, data in [-1, 1].

        Args:
            deep: whether each level has 8 blocks rather than 4.
            **options: options that replace the published ones.

        Returns:
            The network: 61,804,419 parameters (106,632,579 if deep); noise label: 999 t;
            output: the noise.
        """
        return cls(**{"blocks": 8 if deep else 4} | options)

    @classmethod
    @override
    def edm_cifar10(cls, **options: Any) -> Self:
        """Build the "ddpmpp" network of Karras et al., 2022, for CIFAR-10, data in [-1, 1].

        For `EDMModel`; the condition is a vector of 9 augmentation labels; num_classes=10 makes
        it class-conditional.
        """
        published: dict[str, Any] = {
            "multipliers": (2, 2, 2),
            "dropout": 0.13,
            "condition_features": 9,
        }
        return cls(**published | options)
