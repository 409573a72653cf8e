"""The block with a merge in it, whatever library it is of (arXiv 2210.09461, section 3, figure 1).

Blocks differ in the names of their parts, which a :class:`Row` gives, and in how they make q, k and v, which an
:class:`Attention` knows. What lies between is here: add and norm, project, match, attend, output, add, merge and norm,
MLP. Where nobody watches, each half of it is one call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tome import backend, ops
from tome.patch import plain
from tome.patch.plain import AttentionParts, NotPlain, Plan, Reading, has_hooks, through
from tome.patch.row import BlockSettings, Qkv, Row
from tome.patch.swap import Patched, UnsupportedModelError
from tome.recording import PART, is_recording, record
from tome.streams import side_stream
from tome.tokens import Branch, Counts, Mlp, MlpParts, Norm, Tokens, add, keep
from tome_reference.attention import size_bias

P = ParamSpec("P")
T = TypeVar("T")
Half = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # x, what the MLP reads, size, slot


class MergingBlock(Patched):
    """Mixed into a host's block: takes a tensor or :class:`Tokens`, returns tokens, and the last one the full grid."""

    _tome: BlockSettings
    _tome_row: Row
    _tome_last: tuple[Tensor | None, Tensor | None] = (None, None)  # size and slot map behind the last pass
    _tome_chosen: str | None = None  # the backend of the pass that a checkpoint computes again
    _tome_kept: tuple[Reading, Plan] | None = None  # what it computes with, as long as nothing has changed
    _tome_transient = ("_tome_last", "_tome_chosen", "_tome_kept")

    def mlp_parts(self, reading: Reading, mlp: Any) -> MlpParts:
        """What the MLP computes with; raises NotPlain where it is not Linear, GELU, Linear."""
        raise NotImplementedError

    def mlp_reads_linearly(self) -> bool:
        """Whether the MLP reads its tokens through linear layers only."""
        raise NotImplementedError

    def is_unknown(self, argument: object) -> bool:
        """Whether a further argument of a call asks for what merging cannot give."""
        return argument is not None and argument is not False

    def forward(self, x: Tensor | Tokens, *args: Any, **kwargs: Any) -> Any:
        """The tokens that are left, or as many as came in behind the last block."""
        s = self._tome
        record(PART, None, s.name)
        if not isinstance(x, Tokens):
            if s.entry == 0:
                out = super().forward(x, *args, **kwargs)  # of the host's block
                if s.is_last:
                    self._tell(Tokens(out))
                return out
            x = Tokens(x)
        self._check_call(*args, *kwargs.values())
        chosen = self._backend()
        with nullcontext() if chosen is None else backend.use_backend(chosen):
            tokens = self._merged(x)
            if s.is_last:
                self._tell(tokens)
                return tokens.restored()
            # Hooks may take the block's parameters away, with which an addition waits.
            return Tokens(tokens.x, tokens.counts, tokens.steps) if has_hooks(self) else tokens

    def _check_call(self, *others: Any) -> None:
        name = self._tome.name
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise UnsupportedModelError(
                "torch.jit.trace and onnx.export(dynamo=False) cannot follow merged tokens: use torch.export or "
                "onnx.export(dynamo=True)"
            )
        if self._backward_hooks or self._backward_pre_hooks:
            raise UnsupportedModelError(
                f"{name} has backward hooks, which need a tensor between blocks: hook a part of it, or set r = 0"
            )
        if any(map(self.is_unknown, others)):
            raise UnsupportedModelError(f"{name}: a patched block takes no attn_mask: merging moves the tokens")

    def _backend(self) -> str | None:
        # A checkpoint runs the block again in another thread, where the caller's choice of backend does not hold.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._tome.model.backend
        if torch._C._current_graph_task_id() == -1:  # no backward pass
            self._tome_chosen = backend.get_backend()
        return self._tome.model.backend or self._tome_chosen

    def _merged(self, tokens: Tokens) -> Tokens:
        s, row, attn = self._tome, self._tome_row, self._modules[self._tome_row.attn]
        watched = plain.why_watched(tokens.unadded)
        plan = self._plan() if watched is None else Plan(watched, watched, watched, calls={})
        autocast = plain.autocast_dtype(tokens.device_type())
        norm1, norm2 = self._norms(attn, autocast, plan)
        x, y = tokens.enter(norm1)
        if y is None:
            y = x if row.is_post else self._normed(x, norm1, watched)
        amount, left = s.model.matching.plan(s.entry, x.shape[1], s.prefix)
        # Of a plan's parts the verdict on one call depends on no more than this.
        kind = x.dtype, x.get_device(), autocast, backend.get_backend()
        calls = {} if is_recording() else plan.calls.setdefault(kind, {})
        made, done = self._attend_half(plan, calls, attn, x, y, tokens.size, amount, left, norm2)
        if done is None:
            branch, slot = self._attention(attn, y, *made, tokens.size, amount, left)
            done = *add(x, branch, slot, left, tokens.size, norm2), slot
        x, mlp_input, size, slot = done
        steps = tokens.steps if slot is None else (*tokens.steps, slot)
        return Tokens(x, Counts(size), steps, self._mlp(plan, calls, x, mlp_input, norm2))

    def _norms(self, attn: Any, to: torch.dtype | None, plan: Plan) -> tuple[Norm | None, Norm | None]:
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

    def _normed(self, x: Tensor, norm: Norm | None, watched: str | None) -> Tensor:
        if norm is not None and watched is None and backend.takes_kernels(x):
            return ops.merge_add_norm(x, None, None, x.shape[1], None, *norm[:3], None, norm.dtype)[1]
        normed: Tensor = getattr(self, self._tome_row.norm1)(x)
        return normed

    def _attend_half(
        self, plan: Plan, calls: dict[str, Any], attn: Any, x: Tensor, y: Tensor, size: Tensor | None, amount: int,
        left: int, norm: Norm | None,
    ) -> tuple[tuple[Qkv | None, Tensor | None], Half | None]:  # fmt: skip
        """What it made of q, k, v and slot before it could know, and in one call, if that can be, the half."""
        s, kind, qkv, slot = self._tome, self._tome_row.attention, None, None
        parts = plan.attention
        is_own = left < x.shape[1] and s.model.matching.name != "bipartite"
        if not isinstance(parts, str) and left < x.shape[1] and not is_own and side_stream(x) is not None:
            parts = "a CUDA graph is captured, in which matching runs beside attention"
        if isinstance(parts, str) or norm is None:
            record("attend_half", None, parts if isinstance(parts, str) else "the norm behind it is not plain")
            return (None, None), None
        if is_own or parts.qkv is None:
            qkv = kind.project(attn, y, through)
            slot = s.model.matching.rule(qkv[1], amount, s.prefix) if is_own else None
        heads, scale, _ = kind.numbers(attn)
        half = (
            x, qkv or (y,), heads, size, slot, left, s.prefix, s.model.prop_attn, scale,
            parts.qkv if qkv is None else None, *parts[1:], norm[:3], norm.dtype,
        )  # fmt: skip
        # q, k and v that were made by parts may lie anyhow: nothing is known of them.
        call = _one_call(calls if qkv is None else {}, ops.attend_half, *half)
        return (qkv, slot), None if call is None else ops.take(call, *half)

    def _attention(
        self, attn: Any, y: Tensor, qkv: Qkv | None, slot: Tensor | None, size: Tensor | None, amount: int, left: int
    ) -> tuple[Branch, Tensor | None]:
        """What attention adds to the tokens, part by part, and the slot map where some of them merge."""
        s, row = self._tome, self._tome_row
        kind, matching = row.attention, s.model.matching
        weights = size if s.model.prop_attn else None
        side = None
        if kind.is_watched(attn):
            # Called as it is, so that nothing of it is lost; the keys are projected once more, past its hooks.
            record("attention", "torch", f"{row.attn} is watched: it is called, and its keys are computed twice")
            if left < y.shape[1]:
                with torch.no_grad():
                    keys = kind.project(attn, y, lambda part, value: part.forward(value))[1]
                slot = matching.rule(keys, amount, s.prefix)
            value = kind.whole(attn, y, None if weights is None else size_bias(weights).to(y.dtype))
        else:
            q, k, v = qkv or kind.project(attn, y, through)
            if slot is None and left < y.shape[1]:
                side = side_stream(y) if matching.name == "bipartite" else None
                with nullcontext() if side is None else torch.cuda.stream(side):
                    slot = matching.rule(k, amount, s.prefix)
            seen = ops.attention(q, k, v, weights, *kind.numbers(attn)[1:])
            value = kind.output(attn, seen, y)
            if side is not None:  # before the keys that it reads are freed
                torch.cuda.current_stream(y.device).wait_stream(side)
        if row.is_post:
            value = getattr(self, row.norm1)(value)
        return plain.scaled(self, value, row.scale1, row.drop1), slot

    def _mlp(self, plan: Plan, calls: dict[str, Any], x: Tensor, y: Tensor | None, norm: Norm | None) -> Branch | Mlp:
        """What the MLP adds to x, or the MLP itself, where its reader may compute it."""
        row = self._tome_row
        parts = plan.mlp
        if isinstance(parts, str) or y is None or norm is None or has_hooks(self):
            record(
                "mlp_half", None, parts if isinstance(parts, str) else "its norm is not plain, or the block is watched"
            )
        else:
            call = _one_call(calls, ops.mlp_half, x, y, *parts, norm[:3], norm.dtype)
            if call is not None:
                return Mlp(y, parts, call)
        norm2 = getattr(self, row.norm2)
        value = getattr(self, row.mlp)(y if y is not None else x if row.is_post else norm2(x))
        return plain.scaled(self, norm2(value) if row.is_post else value, row.scale2, row.drop2)

    def _plan(self) -> Plan:
        """What the block computes with; read again when anything has changed since."""
        if self._tome_kept is not None and self._tome_kept[0].holds(self):
            return self._tome_kept[1]
        reading, row = Reading(self), self._tome_row
        found: list[Any] = []

        def attention() -> AttentionParts:
            parts = row.attention.read(reading, reading.unwatched(self, row.attn))
            return parts._replace(gamma=reading.gamma(self, row.scale1, row.drop1))

        def mlp() -> MlpParts:
            parts = self.mlp_parts(reading, reading.unwatched(self, row.mlp))
            return parts._replace(gamma=reading.gamma(self, row.scale2, row.drop2))

        def norms() -> tuple[Norm, Norm]:
            return reading.norm(self, row.norm1), reading.norm(self, row.norm2)

        for read in (attention, mlp, norms):
            try:
                found.append(read())
            except NotPlain as error:
                found.append(str(error))
        plan = Plan._make([*found, {}])
        if reading.holds(self):
            self._tome_kept = reading, plan
        return plan

    def _tell(self, tokens: Tokens) -> None:
        """Leave what the model, or :func:`kept`, is asked for behind the last block."""
        keep(tokens)
        trace = self._tome.model.trace_source
        if trace or not torch.compiler.is_compiling():
            self._tome_last = (tokens.size, tokens.slot if trace else None)


def _one_call(known: dict[str, Any], half: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[P, T] | None:
    """As :func:`tome.ops.one_call`, which is not asked again for what is known."""
    call = known[half.__name__] = known.get(half.__name__) or ops.one_call(half, *args, **kwargs)
    return call
