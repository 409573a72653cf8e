"""A block's halves, each as one call: what they compute with, and whether nobody would notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from tome import ops
from tome.patch import plain
from tome.patch.plain import AttentionParts, NotPlain, Plan, Reading, has_hooks, through
from tome.patch.row import BlockSettings, Place, Qkv, Row
from tome.patch.swap import Patched
from tome.recording import record
from tome.streams import side_stream
from tome.tokens import GatedParts, Mlp, MlpParts, Norm, Tokens

P = ParamSpec("P")
T = TypeVar("T")
Half = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # x, what the MLP reads, size, slot


class Halves(Patched):
    """The part of a patched block that computes with what it has read off its modules instead of calling them."""

    _tome: BlockSettings
    _tome_row: Row
    _tome_kept: tuple[Reading, Plan] | None = None  # what it computes with, as long as nothing has changed

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        """What the MLP computes with; raises NotPlain where it is not Linear, GELU, Linear. Gated ones are known."""
        raise NotPlain(f"{self._tome_row.mlp} is a {type(mlp).__name__}")

    def mlp_reads_linearly(self) -> bool:
        """Whether the MLP reads its tokens through linear layers only."""
        return False

    def attend_half(
        self, plan: Plan, calls: dict[str, Any], attn: Any, tokens: Tokens, y: Tensor, place: Place, amount: int,
        left: int, norm: Norm | None,
    ) -> tuple[tuple[Qkv | None, Tensor | None], Half | None]:  # fmt: skip
        """What it made of q, k, v and slot before it could know, and in one call, if that can be, the half."""
        s, kind, qkv, slot, x = self._tome, self._tome_row.attention, None, None, tokens.unadded
        parts, size = plan.attention, tokens.size
        # Keys are matched before they are turned, other than where one call makes and matches them.
        is_own = left < x.shape[1] and (s.model.matching.name != "bipartite" or tokens.is_padded or kind.is_rotary)
        if not isinstance(parts, str):
            heads, scale, dropout_p = kind.numbers(attn)
            if left < x.shape[1] and not is_own and side_stream(x) is not None:
                parts = "a CUDA graph is captured, in which matching runs beside attention"
            elif tokens.is_padded and not s.model.prop_attn:
                parts = "padding weighs nothing, though sizes are not to count"
            elif dropout_p:
                parts = "attention drops weights in training"
        if isinstance(parts, str) or norm is None:
            record("attend_half", None, parts if isinstance(parts, str) else "the norm behind it is not plain")
            return (None, None), None
        if is_own or parts.qkv is None:
            qkv = kind.project(attn, y, through)
            slot = s.model.matching.rule(tokens.matchable(qkv[1]), amount, s.prefix) if is_own else None
            qkv = kind.placed(attn, qkv, place)
        half = (
            x, qkv or (y,), heads, size, slot, left, s.prefix, s.model.prop_attn, scale,
            parts.qkv if qkv is None else None, *parts[1:], norm[:3], norm.dtype,
        )  # fmt: skip
        # q, k and v that were made by parts may lie anyhow: nothing is known of them.
        call = one_call(calls if qkv is None else {}, "attend_half", *half)
        return (qkv, slot), None if call is None else ops.take(call, *half, kept_of(plan.drops[0], x))

    def waiting_mlp(self, plan: Plan, calls: dict[str, Any], x: Tensor, y: Tensor | None, norm: Norm | None) -> Any:
        """The MLP, for its reader to compute in one call, if that can be."""
        parts = plan.mlp
        if not isinstance(parts, MlpParts) or y is None or norm is None or has_hooks(self):
            watched = "its norm is not plain, or the block is watched"
            gated = "mlp is gated" if isinstance(parts, GatedParts) else watched
            record("mlp_half", None, parts if isinstance(parts, str) else gated)
            return None
        call = one_call(calls, "mlp_half", x, y, *parts[:4], norm[:3], norm.dtype)
        if call is None:  # the part that is called draws by itself
            return None
        drop = kept_of(plan.drops[1], x)
        return Mlp(y, parts if drop is None else parts._replace(drop=drop), call)

    def norms(self, attn: Any, to: torch.dtype | None, plan: Plan) -> tuple[Norm | None, Norm | None]:
        """The norms that attention and MLP read x through, where they can be computed with the addition before."""
        row = self._tome_row
        if row.is_post:
            return None, None
        if to is None and not isinstance(plan.norms, str):
            return plan.norms
        first, second = self._modules[row.norm1], self._modules[row.norm2]
        if to is None:
            return plain.norm(row.norm1, first, None), plain.norm(row.norm2, second, None)
        # Autocast would round for a linear layer anyway; writing that dtype at once saves a pass over the tokens.
        return (
            plain.norm(row.norm1, first, to if row.attention.reads_linearly(attn) else None),
            plain.norm(row.norm2, second, to if self.mlp_reads_linearly() else None),
        )

    def _read_mlp(self, reading: Reading) -> MlpParts | GatedParts:
        module = reading.unwatched(self, self._tome_row.mlp)
        return plain.GATED.get(type(module), self.mlp_parts)(reading, module)

    def plan(self) -> Plan:
        """What the block computes with; read again when anything has changed since."""
        if torch.compiler.is_compiling():  # whose guards see to that
            return self._read_plan(Reading(self))
        if self._tome_kept is not None and self._tome_kept[0].holds(self):
            return self._tome_kept[1]
        reading = Reading(self)
        plan = self._read_plan(reading)
        if reading.holds(self):
            self._tome_kept = reading, plan
        return plan

    def _read_plan(self, reading: Reading) -> Plan:
        row = self._tome_row

        def attention() -> AttentionParts:
            parts = row.attention.read(reading, reading.unwatched(self, row.attn))
            return parts._replace(gamma=reading.gamma(self, row.scale1))

        def mlp() -> MlpParts | GatedParts:
            return self._read_mlp(reading)._replace(gamma=reading.gamma(self, row.scale2))

        def norms() -> tuple[Norm, Norm]:
            return reading.norm(self, row.norm1), reading.norm(self, row.norm2)

        found: list[Any] = [_or_why_not(read) for read in (attention, mlp, norms)]
        drops: list[nn.Module | None] = [None, None]
        for i, name in enumerate((row.drop1, row.drop2)):
            drop = _or_why_not(reading.drop, self, name)
            if isinstance(drop, str):
                found[i] = drop
            else:
                drops[i] = drop
        return Plan(found[0], found[1], found[2], (drops[0], drops[1]), {})


def _or_why_not(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
    """What is read, or why it must be called."""
    try:
        return read(*args, **kwargs)
    except NotPlain as error:
        reason: str = error.args[0]  # its own text torch.compile of 2.11 cannot read
        return reason


def kept_of(drop: nn.Module | None, x: Tensor) -> Tensor | None:
    """What stochastic depth leaves of each image's branch in this pass: [B]."""
    if drop is None:
        return None
    dtype = plain.autocast_dtype(x) or x.dtype  # of the branch, for which it would draw
    kept: Tensor = drop(x.new_ones((x.shape[0], 1, 1), dtype=dtype))
    return kept.flatten()


def one_call(known: dict[str, Any], half: str, *args: Any) -> Callable[..., Any] | None:
    """As :func:`tome.ops.one_call`, which is not asked again for what is known."""
    call = known[half] = known.get(half) or ops.one_call(half, *args)
    return call
