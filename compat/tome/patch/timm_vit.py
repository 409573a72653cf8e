"""timm's VisionTransformer: class swaps for the model and its parts, over :mod:`tome.patch.block`.

Only types that are known to the letter are swapped, so a change in timm ends in an error instead of a model that is
quietly wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tome import ops, schedule
from tome.backend import get_backend, use_backend
from tome.patch.block import MergingBlock, Norm, Tokens, UnsupportedModelError, has_hooks, plain_norm
from tome.patch.embed import PatchConv2d, is_patch_conv, pays
from tome.patch.timm_block import BLOCKS, PLAIN_NORMS, check_block
from tome.recording import PART, record
from tome.utils import adjacency
from tome_reference.attention import size_bias


class ModelSettings(NamedTuple):
    """What a patched model needs to know."""

    r: schedule.Schedule = 0
    trace_source: bool = False
    prop_attn: bool = True
    backend: str | None = None


class PatchedViT(VisionTransformer):
    """What both patched model classes add to timm's."""

    _tome: ModelSettings
    _tome_last: tuple[Tensor | None, Tensor | None]  # size and slot map behind the last pass

    @property
    def r(self) -> schedule.Schedule:
        """The schedule: int, (r, inflection), list or float ratio (:mod:`tome.schedule`)."""
        return self._tome.r

    @r.setter
    def r(self, value: schedule.Schedule) -> None:
        entries = schedule.per_layer(len(self.blocks), value)
        self._tome = self._tome._replace(r=value)
        for block, entry in zip(self.blocks, entries, strict=True):
            block._tome_r = entry if isinstance(entry, int) else repr(entry)
            block._tome_prefix = self.num_prefix_tokens
            block._tome_prop_attn = self._tome.prop_attn

    @property
    def _tome_info(self) -> Mapping[str, Any]:
        size, slot = self._tome_last
        return MappingProxyType(
            {
                "r": [b._tome_r if isinstance(b._tome_r, int) else float(b._tome_r) for b in self.blocks],
                "size": None if size is None else size[:, :, None],
                "source": None if slot is None else adjacency(slot),
                "trace_source": self._tome.trace_source,
                "prop_attn": self._tome.prop_attn,
                "class_token": self.cls_token is not None,
                "distill_token": getattr(self, "dist_token", None) is not None,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        # The record of the last pass is no part of the model: it may be large and lie on another device.
        return {**self.__dict__, "_tome_last": (None, None)}

    def forward_tokens(self, x: Tensor, trace: bool = False) -> Tokens:
        """Images [B, 3, H, W] -> the tokens behind the last block, before the final norm.

        Args:
            x: the images.
            trace: follow every original token; ``slot`` of the result is None without it.

        """
        state = tokens = self._embed(x, trace)
        for state in self._run(tokens, len(self.blocks)):  # noqa: B007  # the last one is the result
            pass
        return state

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, restore: bool = False
    ) -> Tensor:
        """Images -> normalised tokens [B, M, C], or [B, N, C] with ``restore``: each original token's output."""
        _refuse_mask(attn_mask, is_causal)
        tokens = self.forward_tokens(x, restore)
        x = self._normed(tokens)
        return _with_size(_restored(x, tokens.slot), None) if restore else _with_size(x, tokens.size)

    def forward_head(self, x: Tensor, pre_logits: bool = False, size: Tensor | None = None) -> Tensor:
        """Tokens -> logits; ``size`` float32 [B, M] is found by itself on the result of forward_features."""
        return self._head(x, self._size_of(x, self.global_pool) if size is None else size, pre_logits)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        _refuse_mask(attn_mask, is_causal)
        tokens = self.forward_tokens(x)
        return self._head(self._normed(tokens), tokens.size)

    def pool(self, x: Tensor, pool_type: str | None = None, size: Tensor | None = None) -> Tensor:
        """The pooling of timm, with every token counted as often as it stands for."""
        pool_type = self.global_pool if pool_type is None else pool_type
        return self._pool(x, self._size_of(x, pool_type) if size is None else size, pool_type)

    def _head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(self._pool(x, size, self.global_pool)))
        return x if pre_logits else self.head(x)

    def _pool(self, x: Tensor, size: Tensor | None, pool_type: str) -> Tensor:
        if size is None:
            return super().pool(x, pool_type)
        if not self.pool_include_prefix:
            spatial, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
        else:
            spatial = x
        if self.attn_pool is not None:
            return self.attn_pool(spatial, attn_mask=size_bias(size).to(x.dtype))
        if pool_type not in ("avg", "avgmax"):
            return super().pool(x, pool_type)  # tokens and maxima do not depend on sizes
        mean = (spatial.float() * (size / size.sum(1, keepdim=True))[:, :, None]).sum(1).to(x.dtype)
        return mean if pool_type == "avg" else 0.5 * (spatial.amax(dim=1) + mean)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        restore: bool = True,
    ) -> Any:
        """The forward_intermediates of timm; ``restore`` (default) gives every layer's features on the full grid.

        With ``restore=False`` and ``output_fmt="NLC"`` each layer returns the tokens it has left.

        Raises:
            ValueError: an unknown output_fmt, or NCHW without restore.

        """
        _refuse_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        if output_fmt == "NCHW" and not restore:
            raise ValueError("merged tokens have no grid: use restore=True, or output_fmt='NLC'")
        wanted, last_wanted = feature_take_indices(len(self.blocks), indices)
        state = tokens = self._embed(x, restore)
        taken = []
        for i, state in enumerate(self._run(tokens, last_wanted + 1 if stop_early else len(self.blocks))):
            if i in wanted:
                features = self.norm(state.x) if norm else state.x
                taken.append(_restored(features, state.slot if restore else None))
        prefix = [y[:, : self.num_prefix_tokens] for y in taken] if self.num_prefix_tokens else None
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            taken = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in taken]

        result: dict[str, Any] = {"image_intermediates": taken}
        if return_prefix_tokens and prefix is not None:
            result["image_intermediates_prefix"] = prefix
        if not intermediates_only:
            final = _restored(self.norm(state.x), state.slot if restore else None)
            result["image_features"] = _with_size(final, None if restore else state.size)
        if output_dict:
            return result
        if return_prefix_tokens and prefix is not None:
            result["image_intermediates"] = list(zip(taken, prefix, strict=True))
        taken = result["image_intermediates"]
        return taken if intermediates_only else (result["image_features"], taken)

    def _embed(self, x: Tensor, trace: bool) -> Tokens:
        record(PART, None, "patch_embed")
        with use_backend(self._tome.backend):
            x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return Tokens.start(x, trace or self._tome.trace_source)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """The step of timm; where nothing needs a graph of it, the patches are written once instead of twice."""
        plain = self._tome_base is VisionTransformer and self.pos_embed is not None and not self.dynamic_img_size
        if not plain or not pays(x) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super()._pos_embed(x)
        pos, n = self.pos_embed, self.num_prefix_tokens
        first = [token for token in (self.cls_token, self.reg_token) if token is not None]
        out = x.new_empty((x.shape[0], n + x.shape[1], x.shape[2]), dtype=torch.result_type(x, pos))
        if first:
            prefix = torch.cat(first, dim=1)
            out[:, :n] = prefix if self.no_embed_class else prefix + pos[:, :n]
        torch.add(x, pos if self.no_embed_class else pos[:, n:], out=out[:, n:])
        return self.pos_drop(out)

    def _run(self, tokens: Tokens, blocks: int) -> Iterator[Tokens]:
        backend = self._tome.backend
        layers: list[nn.Module] = list(self.blocks)
        device = tokens.x.device.type
        for i, block in enumerate(layers[:blocks]):
            record(PART, None, f"blocks.{i}")
            norm = self._norm_between(block, layers[i + 1] if i + 1 < len(layers) else None, device)
            if self.grad_checkpointing:
                call = partial(_run_block, block, backend or get_backend(), next_norm=norm)
                tokens = checkpoint(call, tokens, use_reentrant=False)
            else:
                tokens = block(tokens, norm) if backend is None else _run_block(block, backend, tokens, norm)
            yield tokens
        if not torch.compiler.is_compiling() or self._tome.trace_source:
            self._tome_last = (tokens.size, tokens.slot)

    def _norm_between(self, block: nn.Module, following: nn.Module | None, device: str) -> Norm | None:
        """The norm that reads the block's result, where the block can compute it with its last addition."""
        if has_hooks(block):  # which may replace the result
            return None
        if following is None:
            plain = plain_norm(self.norm, PLAIN_NORMS) if type(self.norm) is not nn.Identity else None
            return None if plain is None else Norm(plain)
        if has_hooks(following) or not isinstance(following, MergingBlock):
            return None
        return following.attention_norm(device)

    def _normed(self, tokens: Tokens) -> Tensor:
        return self.norm(tokens.x) if tokens.normed is None else tokens.normed

    def _size_of(self, x: Tensor, pool_type: str) -> Tensor | None:
        """The sizes that forward_features left on its result."""
        if hasattr(x, "_tome_size"):
            size: Tensor | None = x._tome_size
            return size
        if self.attn_pool is None and pool_type in ("", "token", "max"):
            return None
        if all(block._tome_r == 0 for block in self.blocks):
            return None
        raise ValueError(
            f"{pool_type!r} pooling of merged tokens needs their sizes, and this tensor is not the result of "
            "forward_features itself: pass size=float32 [B, M] (ones for restored features)"
        )


class ToMeVisionTransformer(PatchedViT):
    """A patched VisionTransformer."""

    _tome_base = VisionTransformer


class ToMeVisionTransformerDistilled(PatchedViT, VisionTransformerDistilled):
    """A patched VisionTransformerDistilled (DeiT): its head reads the class and distillation tokens only."""

    _tome_base = VisionTransformerDistilled

    def _head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        return VisionTransformerDistilled.forward_head(self, x, pre_logits)


class ToMeFeatureGetterNet(FeatureGetterNet):
    """The patched result of ``features_only=True``: feature maps keep the full grid."""

    _tome_base = FeatureGetterNet

    @property
    def r(self) -> schedule.Schedule:
        """The schedule of the model inside."""
        value: schedule.Schedule = self.model.r
        return value

    @r.setter
    def r(self, value: schedule.Schedule) -> None:
        self.model.r = value

    @property
    def _tome_info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = self.model._tome_info
        return info


MODELS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: ToMeVisionTransformer,
    VisionTransformerDistilled: ToMeVisionTransformerDistilled,
}


def apply_patch(
    model: nn.Module, trace_source: bool = False, prop_attn: bool = True, use_cuda_ext: bool | None = None
) -> nn.Module:
    """See :func:`tome.patch.timm`."""
    inner: Any = model.model if isinstance(model, FeatureGetterNet) else model
    original = getattr(type(inner), "_tome_base", type(inner))
    _check_model(inner, original)
    backend = None if use_cuda_ext is None else ("cuda" if use_cuda_ext else "reference")
    for block in inner.blocks:
        block.__class__ = BLOCKS.get(type(block), type(block))
    if is_patch_conv(getattr(inner.patch_embed, "proj", None)):
        inner.patch_embed.proj.__class__ = PatchConv2d
    inner.__class__ = MODELS[original]
    inner._tome = ModelSettings(0, trace_source, prop_attn, backend)
    inner._tome_last = (None, None)
    inner.r = 0
    if isinstance(model, FeatureGetterNet):
        model.__class__ = ToMeFeatureGetterNet
    return model


def _run_block(block: nn.Module, backend: str, tokens: Tokens, next_norm: Norm | None) -> Tokens:
    # A checkpoint runs the block again in another thread, where the caller's choice of backend does not hold.
    with use_backend(backend):
        result: Tokens = block(tokens, next_norm)
        return result


def _restored(x: Tensor, slot: Tensor | None) -> Tensor:
    return x if slot is None or slot.shape[1] == x.shape[1] else ops.unmerge(x, slot)


def _with_size(x: Tensor, size: Tensor | None) -> Tensor:
    if not torch.compiler.is_compiling():
        x._tome_size = size  # type: ignore[attr-defined]  # read again by PatchedViT._size_of
    return x


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UnsupportedModelError("a patched model takes no attn_mask and is not causal: merging moves the tokens")


def _check_model(model: Any, original: type[nn.Module]) -> None:
    if original not in MODELS:
        known = ", ".join(f"timm's {cls.__name__}" for cls in MODELS)
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__name__} is not supported (known: {known}). "
            "Patch before torch.compile, DataParallel and other wrappers; subclasses may compute something else"
        )
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise UnsupportedModelError(f"attn_pool: {type(pool).__name__} cannot weigh tokens by their size")
    for i, block in enumerate(model.blocks):
        check_block(f"blocks.{i}", block)
