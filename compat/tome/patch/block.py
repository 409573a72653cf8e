"""The block with a merge in it, whatever library it is of (arXiv 2210.09461, section 3, figure 1).

Blocks differ in the names of their parts, which a :class:`Row` gives, and in how they make q, k and v, which an
:class:`Attention` knows. What lies between is here: add and norm, project, match, attend, output, add, merge and norm,
MLP. Where nobody watches, each half of it is one call (:mod:`tome.patch.halves`).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tome import backend, ops
from tome.patch import plain
from tome.patch.halves import Halves
from tome.patch.plain import Plan, has_hooks, through
from tome.patch.row import NOTHING, Beside, Place, Qkv
from tome.patch.swap import UnsupportedModelError
from tome.recording import PART, is_recording, record
from tome.streams import side_stream
from tome.tokens import Branch, Counts, Mlp, Norm, Tokens, add, enter_first, keep, padded, reader, reentrant
from tome_reference.attention import size_bias


class MergingBlock(Halves):
    """Mixed into a host's block: takes a tensor or :class:`Tokens`, returns tokens, and the last one the full grid.

    Where kernels compute and the model reads protected tokens alone, the last one returns these.
    """

    _tome_last: tuple[Tensor | None, Tensor | None] = (None, None)  # size and slot map behind the last pass
    _tome_chosen: str | None = None  # the backend of the pass that a checkpoint computes again
    _tome_transient = ("_tome_last", "_tome_chosen", "_tome_kept")
    _tome_batch_first = True  # tokens come as [B, N, C]; otherwise as [N, B, C]

    def beside(self, *args: Any, **kwargs: Any) -> Beside:
        """What the host passes beside the tokens; raises UnsupportedModelError for what merging cannot give."""
        if (args or kwargs) and any(other is not None and other is not False for other in (*args, *kwargs.values())):
            raise self.refused("a patched block takes no attn_mask: merging moves the tokens")
        return NOTHING

    @classmethod
    def attentions(cls, block: Any) -> dict[str, Any]:
        """The attention of a host's block that is to be patched, by its name in the block."""
        return {cls._tome_row.attn: getattr(block, cls._tome_row.attn)}

    def call_mlp(self, y: Tensor) -> Tensor:
        """What the MLP makes of its tokens, before scale and drop path."""
        value: Tensor = getattr(self, self._tome_row.mlp)(y)
        return value

    def refused(self, reason: str) -> UnsupportedModelError:
        """The error that names this block."""
        return UnsupportedModelError(f"{self._tome.name}: {reason}")

    def forward(self, x: Tensor | Tokens, *args: Any, **kwargs: Any) -> Any:
        """The tokens that are left, or as many as came in behind the last block."""
        s = self._tome
        record(PART, None, s.name)
        if s.is_first:
            enter_first()
        chosen = self._backend()
        with nullcontext() if chosen is None else backend.use_backend(chosen):
            if not isinstance(x, Tokens) and s.entry == 0 and not self.gains(x, *args, **kwargs):
                return self._of_host(x, *args, **kwargs)
            self._check_call()
            try:
                beside = self.beside(*args, **kwargs)
            except UnsupportedModelError:
                if s.entry or not isinstance(x, Tokens) or x.steps:
                    raise
                return self._of_host(self._turned(x.x), *args, **kwargs)  # as long as nothing has merged
            checkpoint = self._checkpoint(x)
            tokens = x if isinstance(x, Tokens) else padded(self._turned(x), beside.valid, checkpoint)
            tokens = self._merged(tokens, beside)
            if s.is_last:
                self._tell(tokens)
                if not self._is_read_in_part(tokens.unadded):
                    return self._turned(tokens.restored())
                record("restore", None, "the head reads protected tokens alone: no others are restored")
                return self._turned(tokens.leading(s.prefix))
            # Hooks may take the block's parameters away, with which an addition waits.
            return tokens.added() if has_hooks(self) else tokens

    def _of_host(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(x, *args, **kwargs)
        if self._tome.is_last:
            self._tell(Tokens(self._turned(out)))
        return out

    def gains(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether a block that merges nothing is faster by the kernels, and nobody wants more of it than they give."""
        with backend.use_backend(self._tome.model.backend):  # the model asks too, outside of its blocks
            if torch.is_grad_enabled() or has_hooks(self) or not backend.takes_kernels(x):
                return False
        if x.requires_grad:  # in a reentrant checkpoint, which wants a tensor back
            return False
        if (plain.autocast_dtype(x) or x.dtype) not in (torch.float16, torch.bfloat16):
            return False  # attention would be PyTorch's
        if plain.why_watched(x) is not None:
            return False
        try:
            self.beside(*args, **kwargs)
        except UnsupportedModelError:  # a mask, which is no matter as long as nothing merges
            return False
        return not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]

    def _is_read_in_part(self, x: Tensor) -> bool:
        """Whether of the last block's tokens only protected ones are read, for certain."""
        s, model = self._tome, reader()
        return (
            model is not None
            and s.prefix > 0
            and not torch.is_grad_enabled()
            and not has_hooks(self)
            and backend.takes_kernels(x)
            and plain.why_watched(x) is None
            and model._tome_reads_prefix(self)
        )

    def _turned(self, x: Tensor) -> Tensor:
        return x if self._tome_batch_first else x.transpose(0, 1)

    def _check_call(self) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise UnsupportedModelError(
                "torch.jit.trace and onnx.export(dynamo=False) cannot follow merged tokens: use torch.export or "
                "onnx.export(dynamo=True)"
            )
        if self._backward_hooks or self._backward_pre_hooks:
            raise UnsupportedModelError(
                f"{self._tome.name} has backward hooks, which need a tensor between blocks: hook a part of it, or set "
                "r = 0"
            )

    def _checkpoint(self, x: Tensor | Tokens) -> object:
        """The reentrant checkpoint that the tokens are made in; one takes and returns gradients of tensors only."""
        value, made_in = (x.unadded, x.checkpoint) if isinstance(x, Tokens) else (x, None)
        if torch.compiler.is_compiling():  # which has checkpoints of one kind only
            return made_in
        is_asked = not torch.is_grad_enabled() and (made_in is not None or value.requires_grad)
        found = reentrant() if is_asked else None
        if isinstance(x, Tokens) and found is not made_in:
            raise self.refused(
                "merged tokens cannot enter or leave a reentrant checkpoint, which would lose their gradients: use "
                "use_reentrant=False, or one checkpoint around all blocks"
            )
        return found

    def _backend(self) -> str | None:
        # A checkpoint runs the block again in another thread, where the caller's choice of backend does not hold.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._tome.model.backend
        if torch._C._current_graph_task_id() == -1:  # no backward pass
            self._tome_chosen = backend.get_backend()
        return self._tome.model.backend or self._tome_chosen

    def _merged(self, tokens: Tokens, beside: Beside) -> Tokens:
        s, row, attn = self._tome, self._tome_row, self._modules[self._tome_row.attn]
        watched = plain.why_watched(tokens.unadded)
        plan = self.plan() if watched is None else Plan(watched, watched, watched, (None, None), {})
        autocast = plain.autocast_dtype(tokens.unadded)
        norm1, norm2 = self.norms(attn, autocast, plan)
        tokens, y = tokens.enter(norm1)
        x = tokens.unadded
        if y is None:
            y = x if row.is_post else self._normed(x, norm1, watched)
        place = Place(beside.given, tokens.home)
        amount, left = s.model.matching.plan(s.entry, x.shape[1], s.prefix)
        # Of a plan's parts the verdict on one call depends on no more than this.
        if torch.compiler.is_compiling() or is_recording():
            calls: dict[str, Any] = {}
        else:
            calls = plan.calls.setdefault((x.dtype, x.get_device(), autocast, backend.get_backend()), {})
        made, done = self.attend_half(plan, calls, attn, tokens, y, place, amount, left, norm2)
        if done is None:
            branch, slot = self._attention(attn, tokens, y, *made, place, amount, left)
            done = *add(x, branch, slot, left, tokens.size, norm2), slot
        x, mlp_input, size, slot = done
        waiting = self.waiting_mlp(plan, calls, x, mlp_input, norm2)
        if waiting is None:
            waiting = self._mlp(plan, x, mlp_input)
        return tokens.after(x, Counts(size), slot, waiting, row.attention.is_placed)

    def _normed(self, x: Tensor, norm: Norm | None, watched: str | None) -> Tensor:
        if norm is not None and watched is None and backend.takes_kernels(x):
            return ops.merge_add_norm(x, None, None, x.shape[1], None, *norm[:3], None, norm.dtype)[1]
        normed: Tensor = getattr(self, self._tome_row.norm1)(x)
        return normed

    def _attention(
        self, attn: Any, tokens: Tokens, y: Tensor, qkv: Qkv | None, slot: Tensor | None, place: Place, amount: int,
        left: int,
    ) -> tuple[Branch, Tensor | None]:  # fmt: skip
        """What attention adds to the tokens, part by part, and the slot map where some of them merge."""
        s, row = self._tome, self._tome_row
        kind, matching = row.attention, s.model.matching
        weights = tokens.weights(s.model.prop_attn)
        side = None
        if kind.is_watched(attn):
            # Called as it is, so that nothing of it is lost; the keys are projected once more, past its hooks.
            record("attention", "torch", f"{row.attn} is watched: it is called, and its keys are computed twice")
            if left < y.shape[1]:
                slot = matching.rule(tokens.matchable(kind.unwatched_keys(attn, y)), amount, s.prefix)
            value = kind.whole(attn, y, None if weights is None else size_bias(weights).to(y.dtype), place)
        else:
            made = qkv or kind.project(attn, y, through)
            if slot is None and left < y.shape[1]:
                side = side_stream(y) if matching.name == "bipartite" else None
                with nullcontext() if side is None else torch.cuda.stream(side):
                    slot = matching.rule(tokens.matchable(made[1]), amount, s.prefix)
            placed = qkv or kind.placed(attn, made, place)
            value = kind.output(attn, kind.attend(attn, placed, weights, place), y)
            if side is not None:  # before the keys that it reads are freed
                torch.cuda.current_stream(y.device).wait_stream(side)
        if row.is_post:
            value = getattr(self, row.norm1)(value)
        return plain.scaled(self, value, row.scale1, row.drop1), slot

    def _mlp(self, plan: Plan, x: Tensor, y: Tensor | None) -> Branch | Mlp:
        """What the MLP adds to x, part by part; y is x normed, if that is done."""
        row, parts = self._tome_row, plan.mlp
        norm2 = getattr(self, row.norm2)
        y = y if y is not None else x if row.is_post else norm2(x)
        # Activations that the library's modules compute in several passes are one of ours.
        value = parts.value(y) if not isinstance(parts, str) and parts.has_kernel(y) else self.call_mlp(y)
        return plain.scaled(self, norm2(value) if row.is_post else value, row.scale2, row.drop2)

    def _tell(self, tokens: Tokens) -> None:
        """Leave what the model, or :func:`kept`, is asked for behind the last block."""
        keep(tokens)
        trace = self._tome.model.trace_source
        if trace or not torch.compiler.is_compiling():
            self._tome_last = (tokens.size, tokens.slot if trace else None)
