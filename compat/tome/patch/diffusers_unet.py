"""diffusers' denoisers: UNets of Stable Diffusion, DiT and PixArt. Tokens merge around self-attention.

Convolutions and position embeddings want the full grid, so nothing stays merged between modules: on entry to a
self-attention tokens are matched and merged, what it returns is unmerged (arXiv 2303.17604). Attention itself, with
whatever processor it has at the time, runs as it is.

What the attentions of one call have in common travels beside the tokens, in ``cross_attention_kwargs``, so that
threads, checkpointing and compilation see it as a value.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tome import backend, ops
from tome.patch import grid
from tome.patch.swap import Patched, UnsupportedModelError, base_of, check_block, check_own, name_of, parts_of, swap
from tome.recording import PART, record

KEY = "tome"  # in cross_attention_kwargs
# By the names behind diffusers.models, with the name of the latent among the inputs.
HOSTS = {
    "unets.unet_2d_condition.UNet2DConditionModel": "sample",
    "transformers.dit_transformer_2d.DiTTransformer2DModel": "hidden_states",
    "transformers.pixart_transformer_2d.PixArtTransformer2DModel": "hidden_states",
}
JOINT = "image and text tokens share one attention, whose positions are rotated or added for each of them"
VIDEO = "its tokens are those of several frames"
REASONS = {
    "SD3Transformer2DModel": "image and text tokens share one attention",
    "FluxTransformer2DModel": JOINT,
    "Flux2Transformer2DModel": JOINT,
    "ChromaTransformer2DModel": JOINT,
    "QwenImageTransformer2DModel": JOINT,
    "AuraFlowTransformer2DModel": "image and text tokens share one attention",
    "HunyuanDiT2DModel": "rotary positions enter its attention",
    "SanaTransformer2DModel": "its attention is linear, and has nothing to gain",
    "UNetMotionModel": VIDEO,
    "UNet3DConditionModel": VIDEO,
    "UNetSpatioTemporalConditionModel": VIDEO,
}


class Settings(NamedTuple):
    """What a patched denoiser was told."""

    ratio: tuple[int, int]  # numerator and denominator: a float would be a symbol to torch.compile
    sx: int
    sy: int
    use_rand: bool
    seed: int
    share_map: bool
    share_guidance: bool
    backend: str | None


class Step:
    """One call of a denoiser: what its attentions share."""

    def __init__(self, settings: Settings, height: int, width: int, timestep: Any, same: Tensor | None) -> None:
        self.settings, self.height, self.width, self.timestep = settings, height, width, timestep
        self.same = same  # bool [B / 2], whether a sample of the first half has a twin in the second
        self.known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # sources and targets by the size of the grid
        self.maps: dict[tuple[int, int], Tensor] = {}

    def slot(self, attn: Any, y: Tensor, size: tuple[int, int], r: int) -> Tensor:
        """The map of a self-attention that reads y [B, N, C] on a grid of that size."""
        if self.settings.share_map and size in self.maps:
            return self.maps[size]
        with torch.no_grad():
            sources, targets = (positions.expand(y.shape[0], -1) for positions in self.sets(size, y.device))
            slot = ops.set_match(self.metric(attn, y), sources, targets, r)
        if self.settings.share_map:
            self.maps[size] = slot
        return slot

    def metric(self, attn: Any, y: Tensor) -> Tensor:
        """The mean of the keys over heads, float32 [B, N, D]; twins have that of both."""
        keys = attn.to_k(y).unflatten(2, (attn.heads, -1))
        metric = (keys if attn.norm_k is None else attn.norm_k(keys)).mean(dim=2, dtype=torch.float32)
        if self.same is None:
            return metric
        halves = metric.chunk(2)
        mean = (halves[0] + halves[1]) / 2
        return torch.cat([torch.where(self.same[:, None, None], mean, half) for half in halves])

    def sets(self, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Sources and targets: the same ones for all images, and for all blocks of that size."""
        if size not in self.known:
            s = self.settings
            rows, columns = grid.cells(*size, s.sx, s.sy)
            drawn = grid.draws(s.seed, self.timestep, rows * columns, device) if s.use_rand else None
            self.known[size] = grid.sets(*size, s.sx, s.sy, drawn, device)
        return self.known[size]


class MergingAttention(Patched):
    """Mixed into every attention of a denoiser; those with a level merge."""

    _tome: Settings
    _tome_name: str
    _tome_level: int  # the downsampling of its tokens; 0: it merges nothing

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Any:
        """As in diffusers, on merged tokens."""
        step = cross_attention_kwargs.pop(KEY, None)
        s, attend = self._tome, super().forward
        (parts, whole), n = s.ratio, hidden_states.shape[1]
        if self._tome_level == 0 or parts == 0:
            return attend(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        if step is None:
            raise self._tome_refused("it was called past the patched denoiser: call the model, not its forward")
        if attention_mask is not None or encoder_hidden_states is not None:
            raise self._tome_refused("merged self-attention takes no attention_mask and no encoder_hidden_states")
        height, width = size = -(-step.height // self._tome_level), -(-step.width // self._tome_level)
        if hidden_states.dim() != 3 or n != height * width:
            raise self._tome_refused(f"it got tokens {tuple(hidden_states.shape)} for a grid of {height} x {width}")
        rows, columns = grid.cells(height, width, s.sx, s.sy)
        r = min(n * parts // whole, n - rows * columns)
        if r == 0:
            return attend(hidden_states, **cross_attention_kwargs)
        record(PART, None, self._tome_name)
        with nullcontext() if s.backend is None else backend.use_backend(s.backend):
            slot = step.slot(self, hidden_states, size, r)
            merged = ops.merge(hidden_states, slot, n - r)[0]
            return ops.unmerge(attend(merged, **cross_attention_kwargs), slot)

    def _tome_refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._tome_name}: {reason}")


class Denoiser(Patched):
    """Mixed into a denoiser: tells its attentions of what they share."""

    _tome: Settings
    _tome_inputs: tuple[str, ...]  # of forward
    _tome_latent: str  # the name of one of them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; not ``forward``, in whose place other libraries put their own."""
        s, inputs = self._tome, self._tome_inputs
        if s.ratio[0] == 0:
            return super().__call__(*args, **kwargs)
        given = {**dict(zip(inputs, args, strict=False)), **kwargs}
        latent = given[self._tome_latent]
        same = None
        if s.share_guidance and latent.shape[0] % 2 == 0:
            same = torch.eq(*latent.chunk(2)).flatten(1).all(dim=1)
        side = 1 if self._tome_latent == "sample" else cast(Any, self).config.patch_size
        step = Step(s, latent.shape[-2] // side, latent.shape[-1] // side, given.get("timestep"), same)
        beside = {**(given.get("cross_attention_kwargs") or {}), KEY: step}
        place = inputs.index("cross_attention_kwargs")
        if place < len(args):
            args = (*args[:place], beside, *args[place + 1 :])
        else:
            kwargs["cross_attention_kwargs"] = beside
        return super().__call__(*args, **kwargs)


def apply_patch(model: Any, settings: Settings, max_downsample: int | None) -> None:
    """See :func:`tome.patch.diffusers`."""
    name, denoiser = _denoiser(model)
    check_own(name, denoiser)
    levels = dict(_levels(denoiser))
    if not levels:
        raise UnsupportedModelError(f"{type(denoiser).__name__} has no BasicTransformerBlock with self-attention")
    finest = min(levels.values())
    limit = finest if max_downsample is None else max_downsample
    if limit < finest:
        raise ValueError(f"max_downsample={limit} merges nothing: self-attention begins at a downsampling of {finest}")
    attentions = {path: m for path, m in denoiser.named_modules() if base_of(m) is Attention}
    for path, attn in attentions.items():
        check_block(path, attn)
    for path, attn in attentions.items():
        swap(attn, MergingAttention)
        own = cast(MergingAttention, attn)
        own._tome, own._tome_name, own._tome_level = settings, path, levels.get(path, 0)
        own._tome_level *= own._tome_level <= limit
    host = next(_name(kind) for kind in base_of(denoiser).__mro__ if _name(kind) in HOSTS)
    inputs = tuple(inspect.signature(base_of(denoiser).forward).parameters)[1:]
    swap(denoiser, Denoiser)
    outer = cast(Denoiser, denoiser)
    outer._tome, outer._tome_inputs, outer._tome_latent = settings, inputs, HOSTS[host]


def _denoiser(model: Any) -> tuple[str, nn.Module]:
    """The one denoiser in a pipeline, a wrapper, or itself."""
    inside = list(parts_of(model))
    known = [(name, m) for name, m in inside if any(_name(kind) in HOSTS for kind in type(m).__mro__)]
    compiled = [name or "the model" for name, m in inside if type(m).__name__ == "OptimizedModule"]
    if compiled:
        raise UnsupportedModelError(f"{', '.join(compiled)}: patch before torch.compile")
    if len(known) == 1:
        return known[0]
    refused = {type(m).__name__: REASONS[type(m).__name__] for _, m in inside if type(m).__name__ in REASONS}
    why = "".join(f". {name}: {reason}" for name, reason in refused.items())
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} must hold one of "
        f"{', '.join(name.rpartition('.')[2] for name in HOSTS)}; found {len(known)}{why}"
    )


def _name(kind: type) -> str:
    return name_of(kind, "diffusers.models.")


def _levels(denoiser: Any) -> Iterator[tuple[str, int]]:
    """The self-attentions, and the downsampling of each: of a UNet that of the latent, else that of the tokens."""
    at, level = {}, 1
    for i, block in enumerate(getattr(denoiser, "down_blocks", ())):
        at[f"down_blocks.{i}."] = level
        level *= 2 if getattr(block, "downsamplers", None) else 1
    at["mid_block."] = level
    for i, block in enumerate(getattr(denoiser, "up_blocks", ())):
        at[f"up_blocks.{i}."] = level
        level //= 2 if getattr(block, "upsamplers", None) else 1
    for path, module in denoiser.named_modules():
        if isinstance(module, BasicTransformerBlock) and not module.only_cross_attention:
            _check(f"{path}.attn1", module.attn1)
            yield f"{path}.attn1", next((level for start, level in at.items() if path.startswith(start)), 1)


def _check(name: str, attn: Any) -> None:
    if base_of(attn) is not Attention:
        raise UnsupportedModelError(f"{name}: {type(attn).__name__} is not supported")
    # These need the full grid, or add it to what is merged.
    for part in ("spatial_norm", "group_norm", "residual_connection"):
        if getattr(attn, part):
            raise UnsupportedModelError(f"{name}: self-attention with a {part} is not supported")
