"""timm's NaFlexVit: images of different sizes in one batch, padded to as many patches; rotary positions or none.

Padding weighs nothing in attention, and no token merges with it while there are others to merge with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tome.patch.block import MergingBlock
from tome.patch.row import Beside
from tome.patch.swap import UnsupportedModelError
from tome.patch.timm_eva import AnySizeModel, RotaryBlock
from tome.patch.timm_host import TimmModel
from tome.patch.timm_vit import TimmBlock


class PaddedBlock(MergingBlock):
    """Mixed into a block: its ``attn_mask`` marks padding, as the model makes it of ``patch_valid``."""

    def beside(self, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Beside:
        """What the block itself understands, and which tokens are no padding."""
        beside = super().beside(*args, **kwargs)
        return beside if attn_mask is None else beside._replace(valid=self.valid(attn_mask))

    def valid(self, mask: Tensor) -> Tensor:
        """Bool [B, N] of a mask [B, 1, 1, N] for keys, or [B, 1, N, N] for pairs that are both no padding."""
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, mask.shape[3]):
            raise self.refused(f"a mask of padding is [B, 1, 1, N] or [B, 1, N, N], not {list(mask.shape)}")
        own = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=1, dim2=2)
        return own if own.dtype is torch.bool else own > torch.finfo(own.dtype).min


class NaFlexBlock(PaddedBlock, TimmBlock):
    """timm's Block in a NaFlexVit."""


class NaFlexRotaryBlock(PaddedBlock, RotaryBlock):
    """EvaBlock in a NaFlexVit."""


class NaFlexModel(AnySizeModel):
    """A patched NaFlexVit."""

    _tome_variants = {TimmBlock: NaFlexBlock, RotaryBlock: NaFlexRotaryBlock}  # noqa: RUF012

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        model: Any = self
        return model.num_prefix_tokens, model.has_class_token, False

    def _forward_embeds(self, x: Any, patch_coord: Any, patch_valid: Any, attn_mask: Any) -> Any:
        """As in timm, which makes the mask of ``patch_valid`` where it is given none."""
        if attn_mask is not None and self._tome_merges:
            raise UnsupportedModelError(
                f"{type(self).__name__} takes no attn_mask where tokens merge: mark padding with patch_valid"
            )
        return super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)  # type: ignore[misc]


BLOCKS: dict[str, type[MergingBlock]] = {}
MODELS: dict[str, type[TimmModel] | str] = {"naflexvit.NaFlexVit": NaFlexModel}
