"""What the commands share: reading a schedule, making a model, and turning failures into one line."""

from __future__ import annotations

import ast
import difflib
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import click
import torch
from timm.models.vision_transformer import VisionTransformer

from tome import patch, schedule
from tome.measure import checked_device
from tome.patch import UnsupportedModelError, timm_cost, timm_vit
from tome_reference import max_r

RANDOM_WEIGHTS = "--random-weights"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ScheduleType(click.ParamType):  # type: ignore[type-arg]  # no generic in older versions of click
    """``8``, ``8,-1.0``, ``[8,8,4]`` or ``0.05``."""

    name = "schedule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> schedule.Schedule:
        if not isinstance(value, str):
            return cast(schedule.Schedule, value)
        try:
            r = ast.literal_eval(value)
            # Any depth serves to check the form; the model's own is checked once it is known.
            schedule.per_layer(len(r) if isinstance(r, list) else 12, r)
        except (ValueError, TypeError, SyntaxError) as error:
            reason = str(error) if "r" in str(error)[:2] or "inflection" in str(error) else "not a schedule"
            self.fail(f"{value!r}: {reason} (forms: 8 or 8,-1.0 or [8,8,4] or 0.05)", param, ctx)
        return cast(schedule.Schedule, r)


class DeviceType(click.ParamType):  # type: ignore[type-arg]
    """cpu, cuda or cuda:1."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.device:
        if isinstance(value, torch.device):
            return value
        try:
            return checked_device(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast_to(dtype: str | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to a dtype of DTYPES; None leaves it off."""
    return nullcontext() if dtype is None else torch.autocast(device.type, DTYPES[dtype])


def input_size(model: VisionTransformer) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was made for."""
    height, width = model.patch_embed.img_size
    return model.patch_embed.proj.in_channels, height, width


def create_model(name: str, pretrained: bool, device: torch.device | str = "cpu") -> VisionTransformer:
    """A Vision Transformer of timm in eval mode.

    Raises:
        click.UsageError: an unknown model, one that cannot be patched, or weights that cannot be loaded.

    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*"), cutoff=0.0)
        raise click.UsageError(f"unknown model {name!r}; timm has, for instance, {', '.join(near)}")
    if pretrained and not timm.is_model_pretrained(name):
        raise click.UsageError(f"timm has no pretrained weights for {name!r}: use {RANDOM_WEIGHTS}")
    try:
        with warnings.catch_warnings(), torch.device(device):  # random weights of large models are slow on a CPU
            warnings.simplefilter("ignore")
            model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # whatever the hub, the network or the file system raises ends in the same advice
        if not pretrained:
            raise click.UsageError(f"cannot make {name!r}: {_first_line(error)}") from error
        raise click.UsageError(
            f"cannot load the pretrained weights of {name!r} ({_first_line(error)}): connect to the model hub, or "
            f"use {RANDOM_WEIGHTS}"
        ) from error
    return cast(VisionTransformer, model.eval())


def patched(name: str, model: VisionTransformer, r: schedule.Schedule) -> tuple[timm_vit.PatchedViT, schedule.Plan]:
    """The model, patched in place and following ``r``, and its plan.

    Raises:
        click.UsageError: a model that cannot be patched, or a schedule that does not fit it.

    """
    try:
        patch.timm(model)
    except UnsupportedModelError as error:
        raise click.UsageError(str(error)) from error
    assert isinstance(model, timm_vit.PatchedViT)
    tokens, _ = timm_cost.cost(model)
    plan = checked_plan(name, r, len(model.blocks), tokens, model.num_prefix_tokens)
    model.r = r
    return model, plan


def checked_plan(name: str, r: schedule.Schedule, depth: int, tokens: int, prefix: int) -> schedule.Plan:
    """The plan of a schedule that the first layer could follow in full.

    Raises:
        click.BadParameter: a schedule that is not one for this depth, or merges more than half of the free tokens.

    """
    try:
        entries = schedule.per_layer(depth, r)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--r") from error
    most = max_r(tokens, prefix)
    wanted = max(entries, default=0)
    if wanted > most:
        raise click.BadParameter(
            f"{r} is too large: {name} has {tokens} tokens, {prefix} of them protected, so a layer can merge at "
            f"most {most}, not {wanted}",
            param_hint="--r",
        )
    return schedule.plan(r, depth, tokens, prefix)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
