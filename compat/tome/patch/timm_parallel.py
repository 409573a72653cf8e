"""timm's VisionTransformer with other blocks: attention beside the MLP, several of each, differential attention."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome.patch import plain
from tome.patch.block import MergingBlock
from tome.patch.plain import AttentionParts, NotPlain, Reading, has_hooks, through
from tome.patch.row import Beside, Call, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError
from tome.patch.timm_host import TimmModel
from tome.patch.timm_vit import TimmAttention, TimmBlock
from tome.recording import record
from tome.tokens import Branch, Counts, Tokens, add
from tome_reference.attention import aligned, size_bias


class DiffAttention(TimmAttention):
    """timm.layers.DiffAttention: the difference of two attentions, of 2 H heads of half the width."""

    names = frozenset({"DiffAttention"})
    parts = TimmAttention.parts - {"gate"} | {"sub_norm"}

    def heads(self, attn: Any, qkv: Tensor, call: Call) -> Qkv:
        """Q and k [B, 2 H, N, D / 2], those of the two attentions by turns, and v [B, H, N, D]."""
        q, k, v = qkv.chunk(3, dim=2)
        q, k = (part.unflatten(2, (2 * attn.num_heads, attn.head_dim)).transpose(1, 2) for part in (q, k))
        v = v.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        return call(attn.q_norm, q).to(v.dtype), call(attn.k_norm, k).to(v.dtype), v

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        heads, scale, dropout_p = super().numbers(attn)
        return heads, scale, attn.attn_drop_p * attn.training if attn.fused_attn else dropout_p

    def attend(self, attn: Any, qkv: Qkv, size: Tensor | None, place: Place) -> Tensor:
        record("attention", "torch", "values are twice as wide as keys")
        q, k, v = map(aligned, qkv)
        _, scale, dropout_p = self.numbers(attn)
        mask = None if size is None else size_bias(size).to(q.dtype)
        first, second = (
            F.scaled_dot_product_attention(q[:, i::2], k[:, i::2], v, mask, dropout_p, scale=scale) for i in (0, 1)
        )
        return first - attn._compute_lambda().type_as(q) * second

    def joined(self, attn: Any, seen: Tensor) -> Tensor:
        return super().joined(attn, through(attn.sub_norm, seen) * (1 - attn.lambda_init))

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        raise NotPlain("differential attention is called part by part")


class DiffBlock(TimmBlock):
    """timm's Block with differential attention."""

    _tome_row = Row(DiffAttention())


class DiffResPostBlock(TimmBlock):
    """timm's ResPostBlock with differential attention."""

    _tome_row = Row(DiffAttention(), scale1=None, scale2=None, is_post=True)


class MergingLater(MergingBlock):
    """A block whose attention and MLP do not follow each other, one of each."""

    def _add(self, tokens: Tokens, branch: Branch, *keys: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The sum of tokens and branch, in which tokens of similar keys have merged: x, sizes, slot map."""
        s, x = self._tome, tokens.unadded
        amount, left = s.model.matching.plan(s.entry, x.shape[1], s.prefix)
        slot = None
        if left < x.shape[1]:
            slot = s.model.matching.rule(tokens.matchable(torch.cat(keys, dim=1)), amount, s.prefix)
        x, _, size = add(x, branch, slot, left, tokens.size, None)
        return x, size, slot


class ParallelBlock(MergingLater):
    """timm's ParallelScalingBlock: one layer gives q, k, v and the MLP's hidden layer, and one sum takes both.

    Its tokens merge behind that sum, when the MLP has run.
    """

    _tome_row = Row(
        *(TimmAttention(), "", "in_norm", "ls", "drop_path", "", "", None, None),
        others=(
            *("in_proj", "q_norm", "k_norm", "attn_drop", "mlp_drop", "mlp_act"),
            *("out_proj", "attn_out_proj", "mlp_out_proj"),
        ),
    )

    @classmethod
    def attentions(cls, block: Any) -> dict[str, Any]:
        """None: the block itself has the parts of one."""
        if getattr(block, "qkv_bias", None) is not None:  # timm 1.0.20 adds it where the MLP's bias should be
            raise UnsupportedModelError(f"{type(block).__name__}: its biases are in the wrong order; use a newer timm")
        return {}

    def _merged(self, tokens: Tokens, beside: Beside) -> Tokens:
        kind, block = cast(TimmAttention, self._tome_row.attention), cast(Any, self)
        if has_hooks(block.attn_drop) and not block.fused_attn:
            raise self.refused("attn_drop has hooks or a forward of its own, and merged tokens do not pass through it")
        tokens = tokens.added()
        made = block.in_proj(block.in_norm(tokens.unadded))
        hidden, qkv = made.split([block.in_split[0], sum(block.in_split[1:])], dim=2)
        hidden = hidden if block.mlp_bias is None else hidden + block.mlp_bias
        q, k, v = kind.heads(block, qkv, through)
        seen = kind.attend(block, (q, k, v), tokens.weights(self._tome.model.prop_attn), Place())
        seen, hidden = kind.joined(block, seen), through(block.mlp_drop, block.mlp_act(hidden))
        both = getattr(block, "out_proj", None)  # which timm 1.0.20 has not
        if both is not None:
            value = both(torch.cat((seen, hidden), dim=2))
        else:
            value = block.attn_out_proj(seen) + block.mlp_out_proj(hidden)
        x, size, slot = self._add(tokens, plain.scaled(self, value, "ls", "drop_path"), k)
        return tokens.after(x, Counts(size), slot, None, False)


class DiffParallelBlock(ParallelBlock):
    """timm's DiffParallelScalingBlock."""

    _tome_row = ParallelBlock._tome_row._replace(
        attention=DiffAttention(), others=(*ParallelBlock._tome_row.others, "sub_norm")
    )


class ThingsBlock(MergingLater):
    """timm's ParallelThingsBlock: the sum of several attentions, then that of several MLPs.

    What is matched is the mean of their keys.
    """

    _tome_row = Row(TimmAttention(), "attns", "", None, None, "ffns", "", None, None)

    @classmethod
    def attentions(cls, block: Any) -> dict[str, Any]:
        """One of each branch."""
        return {f"attns.{i}.attn": branch.attn for i, branch in enumerate(block.attns)}

    def _merged(self, tokens: Tokens, beside: Beside) -> Tokens:
        tokens, block = tokens.added(), cast(Any, self)
        weights = tokens.weights(self._tome.model.prop_attn)
        pairs = [self._attended(f"attns.{i}", branch, tokens.unadded, weights) for i, branch in enumerate(block.attns)]
        values, keys = zip(*pairs, strict=True)
        x, size, slot = self._add(tokens, Branch(torch.stack(values).sum(dim=0)), *keys)
        branch = Branch(torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0))
        return tokens.after(x, Counts(size), slot, branch, False)

    def _attended(self, name: str, branch: nn.Module, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """What one branch adds, and its keys."""
        if has_hooks(branch):
            raise self.refused(f"{name} has hooks or a forward of its own, but is called part by part: hook a part")
        kind, keys = self._tome_row.attention, None
        for part_name, part in branch.named_children():
            if part_name != "attn":
                y = through(part, y)
            elif kind.is_watched(part):
                keys = kind.unwatched_keys(part, y)
                y = kind.whole(part, y, None if weights is None else size_bias(weights).to(y.dtype), Place())
            else:
                q, keys, v = kind.project(part, y, through)
                y = kind.output(part, kind.attend(part, (q, keys, v), weights, Place()), y)
        return y, cast(Tensor, keys)


BLOCKS: dict[str, type[MergingBlock]] = {
    "vision_transformer.Block": DiffBlock,
    "vision_transformer.ResPostBlock": DiffResPostBlock,
    "vision_transformer.ParallelScalingBlock": ParallelBlock,
    "vision_transformer.DiffParallelScalingBlock": DiffParallelBlock,
    "vision_transformer.ParallelThingsBlock": ThingsBlock,
}
MODELS: dict[str, type[TimmModel] | str] = {}
