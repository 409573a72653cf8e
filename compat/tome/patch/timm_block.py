"""The blocks of timm's Vision Transformers, with a merge in them."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU
from timm.models.vision_transformer import Attention, Block, LayerScale, ResPostBlock
from torch import Tensor, nn

from tome import ops
from tome.patch.block import Branch, Match, MergingBlock, Norm, Tokens, UnsupportedModelError, has_hooks, plain_norm
from tome.patch.timm_whole import is_inert, run_whole, through

BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
PLAIN_NORMS = (nn.LayerNorm, LayerNorm)
LINEAR_READERS = (Mlp, GluMlp, SwiGLU)  # they read their input through linear layers only


class ToMeBlock(MergingBlock, Block):
    """Pre-norm block; takes and returns :class:`Tokens`."""

    _tome_base = Block

    def attention_norm(self, device: str) -> Norm | None:
        return _norm(self.norm1, device, type(self.attn.qkv) is nn.Linear)

    def mlp_norm(self, device: str) -> Norm | None:
        return _norm(self.norm2, device, type(self.mlp) in LINEAR_READERS)

    def attention_branch(
        self, x: Tensor, normed: Tensor | None, size: Tensor | None, match: Match
    ) -> tuple[Branch, Tensor | None]:
        value, slot = attend(self.attn, self.norm1(x) if normed is None else normed, size, match)
        return _branch(value, self.ls1, self.drop_path1), slot

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Branch:
        return _branch(self.mlp(self.norm2(x) if normed is None else normed), self.ls2, self.drop_path2)

    def whole(self, tokens: Tokens, r: int, next_norm: Norm) -> Tokens | None:
        return run_whole(self, tokens, r, next_norm)


class ToMeResPostBlock(MergingBlock, ResPostBlock):
    """Block that normalises its branches; takes and returns :class:`Tokens`."""

    _tome_base = ResPostBlock

    def attention_norm(self, device: str) -> None:
        return None

    def mlp_norm(self, device: str) -> None:
        return None

    def attention_branch(
        self, x: Tensor, normed: Tensor | None, size: Tensor | None, match: Match
    ) -> tuple[Branch, Tensor | None]:
        value, slot = attend(self.attn, x, size, match)
        return Branch(self.drop_path1(self.norm1(value))), slot

    def mlp_branch(self, x: Tensor, normed: Tensor | None) -> Branch:
        return Branch(self.drop_path2(self.norm2(self.mlp(x))))


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {Block: ToMeBlock, ResPostBlock: ToMeResPostBlock}


def attend(attn: Attention, x: Tensor, size: Tensor | None, match: Match) -> tuple[Tensor, Tensor | None]:
    """Timm's Attention with sizes: x [B, N, C] -> (output [B, N, C], what ``match`` makes of the keys)."""
    batch, n, _ = x.shape
    gate = getattr(attn, "gate", None)
    opening = None if gate is None else gate(x).sigmoid()
    qkv = attn.qkv(x).reshape(batch, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    # Under autocast the norms return float32; attention would round it to the dtype of v.
    q, k = through(attn.q_norm, q).to(v.dtype), through(attn.k_norm, k).to(v.dtype)
    slot = match(k)
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    scale = None if attn.fused_attn else attn.scale
    x = ops.attention(q, k, v, size, scale, dropout_p)
    x = x.transpose(1, 2).reshape(batch, n, attn.num_heads * attn.head_dim)
    norm = getattr(attn, "norm", None)
    x = x if norm is None else through(norm, x)
    if opening is not None:
        x = x * opening
    return through(attn.proj_drop, attn.proj(x)), slot


def check_block(name: str, block: nn.Module) -> None:
    """Refuse a block that is not known to the letter.

    Raises:
        UnsupportedModelError: it has other parts, or other attention.

    """
    if getattr(type(block), "_tome_base", type(block)) not in BLOCKS:
        raise UnsupportedModelError(f"{name}: {type(block).__name__} is not supported")
    _check_parts(name, block, BLOCK_PARTS)
    attn: Any = block.attn
    if type(attn) is not Attention:
        raise UnsupportedModelError(f"{name}.attn: {type(attn).__name__} is not supported")
    _check_parts(f"{name}.attn", attn, ATTENTION_PARTS)


def _norm(module: nn.Module, device: str, linear_reader: bool) -> Norm | None:
    plain = plain_norm(module, PLAIN_NORMS)
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if plain is None or not autocast or not linear_reader:
        return None if plain is None else Norm(plain)
    # Autocast would round for the linear layer anyway; writing that dtype at once saves a pass over the tokens.
    return Norm(plain, torch.get_autocast_dtype(device))


def _branch(value: Tensor, scale: nn.Module, drop_path: nn.Module) -> Branch:
    """The branch behind timm's LayerScale and DropPath; a plain LayerScale is left to the addition."""
    if not is_inert(drop_path):
        return Branch(drop_path(scale(value)))
    if type(scale) is LayerScale and not has_hooks(scale):
        return Branch(value, cast(Tensor, scale.gamma))
    return Branch(through(scale, value))


def _check_parts(name: str, module: nn.Module, known: set[str]) -> None:
    unknown = sorted({child for child, _ in module.named_children()} - known)
    if unknown:
        raise UnsupportedModelError(f"{name}: {type(module).__name__} has parts that are not understood: {unknown}")
