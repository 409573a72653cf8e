"""The layer of VideoMAE, whose parts lie deeper than those of the others, and of which one adds its input by itself."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tome.patch.plain import AttentionParts, Reading, has_hooks
from tome.patch.row import Attention, Call, Place, Qkv, Row
from tome.patch.swap import Patched
from tome.patch.transformers_layers import Inner, TransformersBlock, heads
from tome.tokens import MlpParts


class NestedAttention(Attention):
    """VideoMAE's: the layers of q, k and v are in one part, the one behind is in another."""

    parts = frozenset({"attention", "output"})

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        inner = attn.attention
        made = (call(part, y) for part in (inner.query, inner.key, inner.value))
        return cast(Qkv, tuple(heads(part, inner.attention_head_size) for part in made))

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, attn.output(seen.transpose(1, 2).flatten(2), y))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        return cast(Tensor, attn(y, tome_bias=bias))

    def is_watched(self, attn: Any) -> bool:
        return has_hooks(attn) or has_hooks(attn.attention)

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        inner = attn.attention
        return inner.num_attention_heads, inner.scaling, inner.training * inner.dropout_prob

    def reads_linearly(self, attn: Any) -> bool:
        return all(type(part) is nn.Linear for part in attn.attention.children())

    def read(self, reading: Reading, attn: Any) -> AttentionParts:
        reading.unwatched(attn, "attention")
        output = reading.unwatched(attn, "output")
        reading.inert(output, "dropout")
        return AttentionParts(None, reading.linear(output, "dense"))


class BiasedSelfAttention(Patched):
    """VideoMAE's innermost attention, which takes no mask, with a bias to its scores; called so where it is watched."""

    def forward(self, hidden_states: Tensor, tome_bias: Tensor | None = None) -> Any:
        if tome_bias is None:
            return super().forward(hidden_states)
        inner = cast(Any, self)
        q, k, v = (
            heads(part(hidden_states), inner.attention_head_size) for part in (inner.query, inner.key, inner.value)
        )
        weights = (q @ k.transpose(2, 3) * inner.scaling + tome_bias).softmax(dim=-1)
        seen = F.dropout(weights, inner.dropout_prob, inner.training) @ v
        told = weights if inner.config._attn_implementation == "eager" else None
        return seen.transpose(1, 2).flatten(2), told


class VideoMAEBlock(TransformersBlock):
    """The layer of VideoMAE, of which ``output`` adds its input by itself."""

    _tome_row = Row(
        NestedAttention(),
        *("attention", "layernorm_before", None, None, "intermediate", "layernorm_after", None, None),
        others=("output",),
    )
    _tome_inner: ClassVar[dict[str, Inner]] = {
        "attention.attention": Inner(
            "VideoMAESelfAttention", frozenset({"query", "key", "value"}), BiasedSelfAttention
        ),
        "attention.output": Inner("VideoMAESelfOutput", frozenset({"dense", "dropout"})),
        "intermediate": Inner("VideoMAEIntermediate", frozenset({"dense", "intermediate_act_fn"})),
        "output": Inner("VideoMAEOutput", frozenset({"dense", "dropout"})),
    }

    def call_mlp(self, y: Tensor) -> Tensor:
        output: Any = self.output
        if has_hooks(output):
            raise self.refused("output is watched, and adds its input by itself: watch output.dense or the layer")
        return cast(Tensor, output.dropout(output.dense(cast(Any, self).intermediate(y))))

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        output = reading.unwatched(self, "output")
        reading.inert(output, "dropout")
        first, second = reading.linear(mlp, "dense"), reading.linear(output, "dense")
        return MlpParts(first, reading.gelu(mlp, "intermediate_act_fn"), second)
