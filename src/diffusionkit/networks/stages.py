"""Blocks put in a row: what one resolution of a U-Net does on the way down and up."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Stage(nn.Module):
    """A conditioned block and, if given, an attention after it.

    Args:
        block: Module of a feature map and an embedding.
        attention: Module of a feature map, or None.
        recompute: Whether activations are computed again in the backward pass instead of being
            kept. Dropout draws the same mask both times.
    """

    def __init__(
        self, block: nn.Module, attention: nn.Module | None = None, *, recompute: bool = False
    ) -> None:
        """Join block and attention."""
        super().__init__()
        self.block = block
        self.attention = attention
        self.recompute = recompute

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        r"""Apply block and attention.

        Args:
            x: Feature map (B, C, \*spatial).
            emb: Embedding (B, embedding_width), or None.

        Returns:
            Feature map.
        """
        if self.recompute and torch.is_grad_enabled():
            h: Tensor = checkpoint(self._apply_parts, x, emb, use_reentrant=False)
            return h
        return self._apply_parts(x, emb)

    def _apply_parts(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h: Tensor = self.block(x, emb)
        return h if self.attention is None else self.attention(h)


class EncoderLevel(nn.Module):
    """The stages of one resolution on the way down.

    Args:
        stages: The stages, in order.
    """

    def __init__(self, stages: list[Stage]) -> None:
        """Keep the stages."""
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, h: Tensor, emb: Tensor | None) -> list[Tensor]:
        r"""Apply the stages.

        Args:
            h: Feature map (B, C, \*spatial).
            emb: Embedding (B, embedding_width), or None.

        Returns:
            The feature map after each stage.
        """
        outputs = []
        for stage in self.stages:
            h = stage(h, emb)
            outputs.append(h)
        return outputs


class DecoderLevel(nn.Module):
    """The stages of one resolution on the way up, each of which takes one skip.

    Args:
        stages: The stages, in order.
    """

    def __init__(self, stages: list[Stage]) -> None:
        """Keep the stages."""
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, h: Tensor, emb: Tensor | None, skips: list[Tensor]) -> Tensor:
        r"""Apply the stages, each to the feature map joined to the last skip left.

        Args:
            h: Feature map (B, C, \*spatial).
            emb: Embedding (B, embedding_width), or None.
            skips: Feature maps of the encoder; those used are taken off the end.

        Returns:
            Feature map.
        """
        for stage in self.stages:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return h
