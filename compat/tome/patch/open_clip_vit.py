"""open_clip's vision towers: its own VisionTransformer, and timm's in its TimmModel. Text towers stay as they are.

Types are known by name, so that open_clip is not imported for them.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from tome.patch import plain, timm_host
from tome.patch.block import MergingBlock
from tome.patch.ends import is_last_norm, swap_ends
from tome.patch.mha import MhaBlock, MultiheadAttention, check
from tome.patch.model import Intermediates, ReadByForward, begin, hold
from tome.patch.plain import has_hooks, through
from tome.patch.row import Attention, Call, ModelSettings, Place, Qkv, Row
from tome.patch.swap import UnsupportedModelError, base_of, check_own, name_of, swap
from tome_reference.halves import split

HOME = "open_clip.transformer"
# Both cast their result back to the dtype of their input: outside autocast they are the plain LayerNorm. LayerScale is
# not among plain.SCALES: under autocast it returns float32 for half tokens, which then stay so.
NORMS = {f"{HOME}.LayerNorm", f"{HOME}.LayerNormFp32"}


class CustomAttention(Attention):
    """open_clip's own attention, with norms and a factor for each head, but not with cosines, which it cannot run."""

    names = frozenset({"Attention"})
    parts = frozenset({"ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop"})

    def project(self, attn: Any, y: Tensor, call: Call) -> Qkv:
        q, k, v = split((y,), attn.num_heads, (attn.in_proj_weight, attn.in_proj_bias))
        return call(attn.ln_q, q).to(v.dtype), call(attn.ln_k, k).to(v.dtype), v

    def output(self, attn: Any, seen: Tensor, y: Tensor) -> Tensor:
        scaled = seen if attn.head_scale is None else seen * attn.head_scale
        x = through(attn.ln_inner, scaled.transpose(1, 2).flatten(2))
        return through(attn.out_drop, attn.out_proj(x))

    def whole(self, attn: Any, y: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        return cast(Tensor, attn(y, attn_mask=bias))

    def is_watched(self, attn: Any) -> bool:
        return has_hooks(attn) or has_hooks(attn.attn_drop)

    def numbers(self, attn: Any) -> tuple[int, float | None, float]:
        return attn.num_heads, None, attn.attn_drop.p if attn.training else 0.0

    def reads_linearly(self, attn: Any) -> bool:
        return True


class ResidualAttentionBlock(MhaBlock):
    """open_clip's block."""

    _tome_row = Row(MultiheadAttention(), *("attn", "ln_1", "ls_1", None, "mlp", "ln_2", "ls_2", None))


class CustomResidualAttentionBlock(MhaBlock):
    """The one with open_clip's own attention; behind it stands a norm, and behind that the LayerScale."""

    _tome_row = Row(CustomAttention(), *("attn", "ln_1", "ln_attn", "ls_1", "mlp", "ln_2", "ls_2", None))


BLOCKS: dict[str, type[MergingBlock]] = {
    f"{HOME}.ResidualAttentionBlock": ResidualAttentionBlock,
    f"{HOME}.CustomResidualAttentionBlock": CustomResidualAttentionBlock,
}
MODELS = {f"{HOME}.VisionTransformer"}
POOLS = ("_pool", "_global_pool")
TIMM = "open_clip.timm_model.TimmModel"  # timm's model is its trunk


class VisionTransformer(ReadByForward, Intermediates):
    """open_clip's own vision tower."""

    _tome_before = ("conv1", "patch_dropout", "ln_pre")

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        return _blocks(self)  # type: ignore[return-value]

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        return 1, True, False

    def _tome_length(self) -> int | None:
        tower = cast(Any, self)
        drops = not isinstance(tower.patch_dropout, nn.Identity)
        return None if drops else tower.positional_embedding.shape[0]

    def _tome_checkpoints(self) -> bool:
        return getattr(cast(Any, self).transformer, "grad_checkpointing", False)

    def _tome_reads_prefix(self, last: MergingBlock) -> bool:
        tower = cast(Any, self)
        if tower.pool_type != "tok" or tower.attn_pool is not None or tower.output_tokens:
            return False
        return (
            name_of(type(tower.transformer)) == f"{HOME}.Transformer"
            and tower.transformer.resblocks[-1] is last
            and is_last_norm(tower.ln_post)
            and self._tome_is_hosts(f"{HOME}.VisionTransformer", POOLS, (tower.transformer, tower.ln_post))
        )


def knows(model: nn.Module) -> bool:
    """Whether the model is one of MODELS, or a TimmModel around a model of timm that is known."""
    names = _names(model)
    return bool(names & MODELS) or (TIMM in names and timm_host.knows(cast(Any, model).trunk))


def known_models() -> list[str]:
    """The names of MODELS and TIMM, without their homes."""
    return sorted(name.rpartition(".")[2] for name in (*MODELS, TIMM))


def apply_patch(model: nn.Module, settings: ModelSettings) -> nn.Module:
    """See :func:`tome.patch.open_clip`."""
    tower: Any = getattr(model, "visual", model)
    check_own("", model)
    if TIMM in _names(tower):
        timm_host.apply_patch(tower.trunk, settings)
        hold(tower, "trunk")
        hold(model, "visual.trunk" if tower is not model else "")
        return model
    if not _names(tower) & MODELS:
        raise UnsupportedModelError(
            f"{type(tower).__module__}.{type(tower).__name__} is no vision tower that is supported: open_clip's "
            "VisionTransformer, or its TimmModel around one of timm's"
        )
    check_own("visual", tower)
    blocks = _blocks(tower)
    check(blocks, lambda block: BLOCKS.get(name_of(base_of(block))))
    for name, block in blocks.items():
        if getattr(cast(Any, block).attn, "logit_scale", None) is not None:
            raise UnsupportedModelError(f"{name}.attn: attention by cosines is not supported, nor can open_clip run it")
    for part in tower.modules():
        if name_of(type(part)) in NORMS:
            plain.NORMS[type(part)] = True
        elif name_of(type(part)) == f"{HOME}.QuickGELU":
            plain.GELUS[type(part)] = lambda _: "quick"
    for block in blocks.values():
        swap(block, BLOCKS[name_of(base_of(block))])
    swap_ends([tower.conv1], tower.ln_post, settings.backend)
    begin(tower, VisionTransformer, settings)
    hold(model, "visual" if tower is not model else "")
    return model


def _blocks(tower: Any) -> dict[str, nn.Module]:
    return {f"transformer.resblocks.{i}": block for i, block in enumerate(tower.transformer.resblocks)}


def _names(module: object) -> set[str]:
    return {name_of(kind) for kind in type(module).__mro__}
