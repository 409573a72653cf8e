"""What ``tome evaluate``, ``tune`` and ``report`` run: a model in all its variants, and images that fit it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from tome import cost, data, datasets, evaluate, patch, schedule
from tome.cli import models
from tome.cli.bench import DEFAULT
from tome.cli.sources import SOURCES

UNPATCHED = "unpatched"
MOST = 1024  # images in a batch of --batch-size auto: more bring no speed
ON_A_CPU = 16


@dataclass(frozen=True)
class Options:
    """The arguments of the command line."""

    model: str
    data: str
    root: Path | None
    schedules: tuple[schedule.Schedule, ...]
    dtype: str
    autocast: str | None
    compiled: bool
    batch_size: int | None
    workers: int | None
    limit: int | None
    labels: bool
    device: str | None
    checkpoint: Path | None
    random_weights: bool
    image_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop: float | None
    interpolation: str | None
    json_file: Path | None
    plot_file: Path | None
    resume: bool

    def weights(self) -> str:
        """Where the weights come from."""
        if self.checkpoint is not None:
            return str(self.checkpoint)
        return "random" if self.random_weights else "the function's own" if _is_function(self.model) else "pretrained"


class Setup:
    """The model in all its variants, and the images."""

    def __init__(self, options: Options, device: torch.device) -> None:
        set_fused_attn(True)
        torch.manual_seed(0)
        pretrained = not options.random_weights
        try:  # before the weights, which may take long
            source = datasets.find(options.data, options.root)
        except data.DataError as error:
            raise click.UsageError(str(error)) from error
        model, told = models.load(options.model, pretrained, device, options.checkpoint)
        shape = models.patched_shape(model)
        if options.image_size is not None:
            models.check_image_size(options.model, model, options.image_size, "--image-size")
            shape = models.patched_shape(model)
        self.checksums = [_checksum(model)] if options.json_file is not None else []
        fitting = tuple(r for r in DEFAULT if schedule.too_large(r, *shape) is None)
        self.plans = {UNPATCHED: schedule.plan(0, *shape)}
        self.schedules = options.schedules or fitting
        for r in self.schedules:
            self.plans[str(r)] = models.checked_plan(options.model, shape, r)
        try:
            chosen = {key: getattr(options, key) for key in ("mean", "std", "interpolation")}
            self.pixels = data.pixels(model, told(), crop_pct=options.crop, **chosen)
        except data.DataError as error:
            raise click.UsageError(str(error)) from error
        self.images = data.Images.of(source, self.pixels, options.data, options.limit)
        if options.json_file is not None:
            self.checksums.append(source.checksum())
        self.size = cost.input_size(model)
        patch.unpatch(model)
        self.dtype, self.device = models.dtype_of(options.dtype), device
        base = evaluate.Split(model.to(self.dtype), torch.zeros(1, *self.size, device=device, dtype=self.dtype))
        self.base = base
        self.classes, self.labelled = base.classes, options.labels and self.images.classes is not None
        if self.labelled and self.classes is not None and len(self.images.classes or ()) != self.classes:
            raise click.UsageError(
                f"{options.data} has {len(self.images.classes or ())} classes and {options.model} tells {self.classes} "
                "apart: choose images or weights of the same classes, or compare without labels by --no-labels"
            )
        self.shape, self.autocast = shape, options.autocast
        layers = {UNPATCHED: base} | {str(r): evaluate.twin(base, r) for r in self.schedules}
        self.eager = {name: self._call(each) for name, each in layers.items()}
        self.calls = self.eager
        if options.compiled:
            torch._dynamo.config.recompile_limit = max(16, 2 * len(layers))  # all share the code of one class
            made = {name: torch.compile(each, dynamic=False) for name, each in layers.items()}
            self.calls = {name: self._call(each) for name, each in made.items()}

    def add(self, name: str, r: schedule.Schedule) -> None:
        """One more schedule, not compiled."""
        self.plans[name] = schedule.plan(r, *self.shape)
        self.calls[name] = self._call(evaluate.twin(self.base, r))

    def _call(self, layers: Callable[[Tensor], evaluate.Outputs]) -> Callable[[Tensor], evaluate.Outputs]:
        def call(x: Tensor) -> evaluate.Outputs:
            with models.autocast_to(self.autocast, self.device):
                return layers(x.to(self.dtype))

        return call

    def batch_size(self, most: int = MOST) -> int:
        """The largest that fits on a GPU, up to ``most``."""
        most = min(most, 1 << (len(self.images.dataset) - 1).bit_length())
        if self.device.type != "cuda":
            return min(most, ON_A_CPU)

        @torch.inference_mode()
        def run(size: int) -> None:
            x = torch.zeros(size, *self.size, device=self.device)
            for call in self.eager.values():
                call(x)

        return evaluate.largest_batch(run, most, self.device)


def _is_function(name: str) -> bool:
    prefix = name.partition(":")[0]
    return ":" in name and prefix not in (*models.TIMM_PREFIXES, *SOURCES)


def _checksum(model: nn.Module) -> int:
    found = 0
    for tensor in model.state_dict().values():
        found = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found
