"""Fine-tune a Vision Transformer while its tokens merge: faster steps, less memory, and weights that are used to it.

    python examples/finetune.py photos/ --model vit_small_patch16_224 --pretrained --r 16 --amp
    torchrun --nproc-per-node 8 -- examples/finetune.py photos/ --model vit_base_patch16_224 --r 16 --amp --fsdp
    python examples/finetune.py digits --model examples.finetune:digits_vit --r 8 --no-aug --lr 1e-3

DATA has a folder of each class in DATA/train and DATA/val, or is ``digits``. The names of options are those of timm's
train.py. Whatever is drawn by chance is drawn for an image of an epoch (augmentation) or a micro-batch of an update
(drop path, mixup), so that neither the number of processes nor an interruption changes it. See docs/training.md.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from timm.data import Mixup, create_transform
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tome import UnsupportedModelError, cost, data, datasets, schedule
from tome.cli import files, models
from tome.cli.arguments import DeviceType, ScheduleType, SizeType
from tome.cli.processes import Place, joined
from tome.measure import machine
from tome.patch.model import patched_in

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHED = ("reduce-overhead", "max-autotune")
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "none")
FUSED = ("adam", "adamw")  # in one launch on a GPU; of torch's others sharded tensors know no such
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What a run that goes on may change: none of it changes what is computed, but for rounding.
FREE = {
    "device", "workers", "output", "resume", "fsdp", "torchcompile", "torchcompile_mode", "grad_accum_steps",
    "grad_checkpointing",
}  # fmt: skip


def digits_vit() -> nn.Module:
    """A small model for ``digits``, of random weights: 64 patches of 2 x 2 pixels."""
    model: Any = VisionTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=5, num_heads=3
    )
    nn.init.normal_(model.pos_embed, std=0.5)  # on so little data positions are learned slowly from a small start
    model.pretrained_cfg = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    return model


def r_of(o: Any, epoch: int) -> schedule.Schedule:
    """The schedule of an epoch: rises from 0 in the first ``r_warmup`` epochs, is 0 in the last ``r_off``."""
    share = 0.0 if epoch >= o.epochs - o.r_off else min(1.0, epoch / o.r_warmup) if o.r_warmup else 1.0
    if isinstance(o.r, tuple):
        return round(share * o.r[0]), o.r[1]
    if isinstance(o.r, list):
        return [round(share * each) for each in o.r]
    return share * o.r or 0 if isinstance(o.r, float) else round(share * o.r)


def seed(*numbers: int) -> None:
    """Set every generator that transforms, mixup and layers draw from."""
    torch_seed, numpy_seed = (int(each) for each in np.random.SeedSequence(numbers).generate_state(2))
    random.seed(numpy_seed)
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed takes note of each call, for devices to come
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(torch_seed)


class Augmented(data.ImageDataset):
    """Images that are augmented in the same way whoever reads them, and in another one in each epoch."""

    def __init__(self, source: data.Source, pixels: data.Pixels, o: Any) -> None:
        keys = ("input_size", "mean", "std", "interpolation")
        config = {key: pixels.config[key] for key in keys} | {"is_training": True, "use_prefetcher": True}
        augment = {"scale": o.scale, "hflip": o.hflip, "color_jitter": o.color_jitter, "auto_augment": o.aa}
        transform = data.Pixels(pixels.config)
        transform.to_bytes = create_transform(**config, **({"no_aug": True} if o.no_aug else augment))
        super().__init__(source, transform)
        self.seed, self.epoch = o.seed, 0

    def __getitem__(self, i: int) -> Any:
        seed(self.seed, 0, self.epoch, i)
        return super().__getitem__(i)


def open_sources(o: Any) -> tuple[data.Source, data.Source]:
    """The images to train on and to validate on."""
    if o.data_dir == "digits":
        return datasets.Digits(train=True), datasets.Digits()
    root = Path(o.data_dir)
    val = next((name for name in ("val", "validation", "test") if (root / name).is_dir()), "val")
    for folder in (root, root / "train", root / val):
        if not folder.is_dir():
            raise data.DataError(f"there is no folder {folder}: expected DATA/train and DATA/val, or digits")
    train, held_out = datasets.Folder(root / "train"), datasets.Folder(root / val)
    if not train.classes:
        raise data.DataError(f"there is no folder for each class in {root / 'train'}")
    if train.classes != held_out.classes:
        odd = sorted({*train.classes} ^ {*(held_out.classes or ())})
        raise data.DataError(f"{root / val} has not the classes of {root / 'train'}: {', '.join(odd[:3])} in one only")
    return train, held_out


def logits(output: Any) -> Tensor:
    """Of timm's and torchvision's models the output, of transformers' a part of it."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise click.UsageError(f"the model gives no logits but {type(found).__name__}: choose one with a head")
    return found


def make_model(o: Any, classes: int, device: torch.device) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """The patched model with a head for the classes, and what its library says of its images."""
    model, told = models.load(o.model, o.pretrained, device, o.initial_checkpoint)
    models.check_image_size(o.model, model, o.img_size, "--img-size")
    image = torch.zeros(2, *cost.input_size(model), device=device)
    outputs = logits(model(image)).shape[1]
    if outputs != classes:
        set_head(model, outputs, classes)
    shape = models.patched_shape(model)
    models.checked_plan(o.model, shape, o.r)
    if o.drop_path:
        set_drop_path(model, o.drop_path)
    if o.grad_checkpointing:
        enable = getattr(model, "set_grad_checkpointing", getattr(model, "gradient_checkpointing_enable", None))
        if enable is None:
            raise click.BadParameter(f"{o.model} has none", param_hint="--grad-checkpointing")
        enable()
    logits(model(image)).sum().backward()
    for parameter in model.parameters():  # such as the token of masks: DDP would wait for its gradient
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    return model, told


def set_head(model: Any, outputs: int, classes: int) -> None:
    """Give a model a new head."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
        return
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    name, last = layers[-1] if layers else ("", None)
    if last is None or last.out_features != outputs:
        raise click.UsageError(f"{type(model).__name__} tells {outputs} classes apart, the images have {classes}")
    model.set_submodule(name, nn.Linear(last.in_features, classes, device=last.weight.device))
    if hasattr(model, "config"):
        model.config.num_labels = classes


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth that grows from 0 in the first block to ``rate`` in the last, as timm's."""
    inner = patched_in(model)
    assert inner is not None
    blocks = list(inner._tome_blocks().values())
    found = [(i, name) for i, block in enumerate(blocks) for name, _ in block.named_children() if "drop_path" in name]
    if not found:
        raise click.BadParameter(f"blocks of {type(model).__name__} have none", param_hint="--drop-path")
    for i, name in found:
        setattr(blocks[i], name, DropPath(rate * i / max(1, len(blocks) - 1)))


class Run:
    """A model in training: what an epoch needs, and what a checkpoint holds."""

    def __init__(self, o: Any, place: Place) -> None:
        self.o, self.place, self.rows = o, place, list[dict[str, Any]]()
        train, val = open_sources(o)
        classes = len(train.classes or ())
        if place.device.type == "cuda":
            torch.cuda.init()
        seed(o.seed)
        self.model, told = make_model(o, classes, place.device)
        self.pixels = data.pixels(self.model, told(), crop_pct=o.crop_pct)
        self.augmented = Augmented(train, self.pixels, o)
        self.val = data.Images.of(val, self.pixels, "val")
        self.micro_batches = o.grad_accum_steps * place.world  # of an update
        self.updates = len(train) // (self.micro_batches * o.batch_size)  # of an epoch
        if not self.updates:
            needed = f"{self.micro_batches} x {o.batch_size}"
            raise click.UsageError(f"{len(train)} images to train on are fewer than an update takes ({needed})")
        self.mixup = None
        if o.mixup or o.cutmix:
            self.mixup = Mixup(o.mixup, o.cutmix, label_smoothing=o.smoothing, num_classes=classes)
        self.ema = ModelEmaV3(self.model, o.model_ema_decay, use_warmup=o.model_ema_warmup) if o.model_ema else None
        self.wrapped = self.distributed()
        self.call = self.wrapped
        if o.torchcompile:
            torch._dynamo.config.recompile_limit = 16 + 2 * o.epochs  # each r is a graph
            options = {"dynamic": False, "mode": o.torchcompile_mode}
            if o.fsdp:  # inside of FSDP's hooks, which cannot be traced
                self.model.forward = torch.compile(self.model.forward, **options)
            else:
                self.call = torch.compile(self.wrapped, **options)
        try:
            fused = {"fused": True} if place.device.type == "cuda" and o.opt in FUSED else {}
            self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(o), **fused)
        except (ValueError, AssertionError, KeyError, TypeError) as error:
            raise click.UsageError(f"no optimiser {o.opt} with these options: {error}") from error
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(o), updates_per_epoch=self.updates
        )

    def distributed(self) -> Any:
        """The model as it is called in training; its parts are sharded in place."""
        place, o = self.place, self.o
        if o.fsdp:
            mesh = init_device_mesh(place.device.type, (place.world,))
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if o.amp else MixedPrecisionPolicy()
            for model in [self.model] if self.ema is None else [self.model, self.ema.module]:
                for block in () if o.torchcompile else patched_in(model)._tome_blocks().values():
                    fully_shard(block, mesh=mesh, mp_policy=policy)
                fully_shard(model, mesh=mesh, mp_policy=policy)
                if place.device.type == "cpu":
                    model.set_force_sum_reduction_for_comms(True)  # gloo has no mean
            return self.model
        if place.world == 1:
            return self.model
        devices = [place.device] if place.device.type == "cuda" else None
        megabytes = 100 if o.torchcompile else None  # a compiled model is cut at each bucket: few cost the host less
        return DistributedDataParallel(self.model, devices, bucket_cap_mb=megabytes, gradient_as_bucket_view=True)

    def autocast(self) -> AbstractContextManager[object]:
        return models.autocast_to("bfloat16" if self.o.amp else None, self.place.device)

    def accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        """Leave the exchange of gradients to the last micro-batch of an update."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(is_last)
        elif isinstance(self.wrapped, DistributedDataParallel) and not is_last:
            return self.wrapped.no_sync()
        return nullcontext()

    def read(self, images: data.Images, order: list[int] | None = None) -> Iterator[data.Batch]:
        """The batches of this process."""
        o, place = self.o, self.place
        return data.batches(images, o.batch_size, o.workers, place.device, place.rank, place.world, order)

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the images; figures of all processes."""
        o, device = self.o, self.place.device
        self.model.r = r_of(o, epoch)
        self.model.train()
        self.augmented.epoch = epoch
        shuffled = torch.Generator().manual_seed(int(np.random.SeedSequence((o.seed, 1, epoch)).generate_state(1)[0]))
        order = torch.randperm(len(self.augmented), generator=shuffled).tolist()
        order = order[: self.updates * self.micro_batches * o.batch_size]
        batches = self.read(data.Images(self.augmented, None, "train"), order)
        total, broken, begin, started = torch.zeros(2, device=device), list[str](), time.perf_counter(), 0.0
        told = f"epoch {epoch + 1}/{self.epochs}"
        for i in track(range(self.updates), told, console=Console(stderr=True), disable=self.place.rank > 0):
            update = epoch * self.updates + i
            for step, batch in enumerate(itertools.islice(batches, o.grad_accum_steps), 1):
                seed(o.seed, 2, update, (step - 1) * self.place.world + self.place.rank)
                started = started or time.perf_counter()
                with self.accumulating(step == o.grad_accum_steps):
                    total += self.backward(batch)
                broken += batch.broken
            if o.clip_grad:
                nn.utils.clip_grad_norm_(self.model.parameters(), o.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(self.model, step=update + 1)
            if self.scheduler is not None:
                self.scheduler.step_update(update + 1)
        loss, seen = self.summed(total)
        seconds = time.perf_counter() - begin
        if not math.isfinite(loss):
            raise click.ClickException(f"the loss of epoch {epoch + 1} is {loss}: choose a smaller --lr")
        row = {"epoch": epoch, "r": self.model.r, "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        row |= {"train_loss": loss / seen, "seconds": seconds, "images_per_second": seen / seconds}
        row["seconds_to_first_batch"] = started - begin
        if device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        broken = sorted(itertools.chain(*self.place.gathered(broken)))
        return row | ({"broken": broken} if broken else {})

    def backward(self, batch: data.Batch) -> Tensor:
        """Gradients of a micro-batch; the sum of its losses, and of how many images."""
        if len(batch.x) < (2 if self.mixup else 1):
            raise click.ClickException(f"no image of a batch can be read: {batch.broken[0]}")
        x, label = batch.x, batch.label
        if self.mixup:
            x, label = self.mixup(x[: len(x) // 2 * 2], label[: len(x) // 2 * 2])
        with self.autocast():
            loss = cross_entropy(
                logits(self.call(x)).float(), label, label_smoothing=0.0 if self.mixup else self.o.smoothing
            )
        (loss / self.o.grad_accum_steps).backward()
        return torch.stack((loss.detach() * len(x), loss.new_full((), len(x))))

    def summed(self, values: Tensor) -> list[float]:
        """Over all processes."""
        if self.place.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    @torch.compiler.set_stance("force_eager")  # also where the model's own forward is compiled, as FSDP needs it
    @torch.no_grad()
    def validate(self, model: Any, r: schedule.Schedule) -> dict[str, float]:
        """Loss and accuracies in percent of a model as it would be used, with r."""
        model.r = r
        model.eval()
        sums = torch.zeros(4, device=self.place.device)
        batches = self.read(self.val)
        every = math.ceil(len(self.val.dataset) / self.o.batch_size)
        for _ in range(math.ceil(every / self.place.world)):
            batch = next(batches, None)
            if batch is None or not len(batch.x):  # sharded weights are gathered by all processes or none
                model(torch.zeros(1, *cost.input_size(model), device=self.place.device))
                continue
            with self.autocast():
                found = logits(model(batch.x)).float()
            best = found.topk(min(5, found.shape[1])).indices == batch.label[:, None]
            parts = (cross_entropy(found, batch.label, reduction="sum"), best[:, 0].sum(), best.sum())
            sums += torch.stack([*(part.float() for part in parts), found.new_full((), len(found))])
        loss, top1, top5, count = self.summed(sums)
        if not count:
            raise click.ClickException("none of the images to validate on can be read")
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch, and validate with --r and without merging."""
        row = self.train_epoch(epoch)
        for name, model in [("eval", self.model), *([("ema", self.ema.module)] if self.ema else [])]:
            row[name] = self.validate(model, self.o.r)
            row[f"{name}_unmerged"] = self.validate(model, 0) if self.o.r else row[name]
        self.rows.append(row)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1)
        return row

    def recipe(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        kept = {key: value for key, value in vars(self.o).items() if key not in FREE}
        return kept | {"images of an update": self.micro_batches * self.o.batch_size}

    def save(self, file: Path) -> None:
        """Everything that --resume needs, the same for any number of processes."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        ema = None if self.ema is None else get_model_state_dict(self.ema.module, options=WHOLE)
        if self.place.rank == 0:
            kept = {"model": model, "optimizer": optimizer, "ema": ema, "rows": self.rows, "recipe": self.recipe()}
            with files.replacing(file) as target:
                torch.save(kept, target)

    def load(self, file: Path) -> int:
        """Go on from a checkpoint; the next epoch."""
        try:
            kept = torch.load(file, map_location="cpu", weights_only=True)
            recipe = kept["recipe"]
        except Exception as error:  # of pickle, zip and the file system
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise click.BadParameter(f"cannot go on from {file} ({reason})", param_hint="--resume") from error
        for key, value in self.recipe().items():
            if recipe.get(key) != value:
                told = f"{file} is of a run with {key} {recipe.get(key)}, not {value}"
                raise click.BadParameter(told, param_hint="--resume")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=kept["model"],
            optim_state_dict=kept["optimizer"],
            options=WHOLE,
        )
        if self.ema is not None:
            set_model_state_dict(self.ema.module, kept["ema"], options=WHOLE)
        self.rows = kept["rows"]
        if self.scheduler is not None:
            self.scheduler.step(len(self.rows))
            self.scheduler.step_update(len(self.rows) * self.updates)
        return len(self.rows)


def line(row: dict[str, Any], epochs: int) -> str:
    """An epoch for the terminal."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}", f"r {row['r']}", f"loss {row['train_loss']:.4f}"]
    for name in ("eval", "ema"):
        if name in row:
            unmerged = row[f"{name}_unmerged"]["top1"]
            parts.append(f"{'top-1' if name == 'eval' else name} {row[name]['top1']:.2f}% (unmerged {unmerged:.2f}%)")
    if "broken" in row:
        parts.append(f"{len(row['broken'])} broken: {row['broken'][0]}")
    return "  ".join([*parts, f"{row['images_per_second']:.0f} images/s", f"{row['seconds']:.1f} s"])


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Losses and accuracies over epochs."""
    pyplot = files.pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] + 1 for row in rows]
    left.plot(epochs, [row["train_loss"] for row in rows], label="training")
    for name, label in {"eval": "weights", "ema": "averaged weights"}.items():
        if name in rows[0]:
            left.plot(epochs, [row[name]["loss"] for row in rows], label=f"validation, {label}")
            (drawn,) = right.plot(epochs, [row[name]["top1"] for row in rows], label=f"{label}, merged")
            unmerged = [row[f"{name}_unmerged"]["top1"] for row in rows]
            right.plot(epochs, unmerged, "--", color=drawn.get_color(), label=f"{label}, unmerged")
    for axes, label in ((left, "loss"), (right, "top-1, %")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend(fontsize=8)
    with files.replacing(file) as target:
        figure.savefig(target, dpi=150)
    pyplot.close(figure)


def finetune(o: Any) -> None:
    """Train, and write last.pt and log.json behind each epoch, model.pt and curves.png behind the last."""
    check(o)
    out = o.output
    with joined(o.device) as place:
        if o.fsdp and place.world == 1:
            raise click.UsageError("--fsdp shards over processes: start them by torchrun --nproc-per-node N")
        try:
            run = Run(o, place)
        except (data.DataError, UnsupportedModelError) as error:
            raise click.UsageError(str(error)) from error
        start = 0 if o.resume is None else run.load(o.resume)
        if place.rank == 0:
            files.make_folder(out, "--output")
        for epoch in range(start, run.epochs):
            row = run.epoch(epoch)
            run.save(out / "last.pt")
            if place.rank == 0:
                click.echo(line(row, run.epochs))
                write_log(run, out / "log.json")
        final = get_model_state_dict(run.ema.module if run.ema else run.model, options=WHOLE)
        if place.rank == 0:
            with files.replacing(out / "model.pt") as target:
                torch.save(final, target)
            plot(run.rows, out / "curves.png")
            seconds = sum(row["seconds"] for row in run.rows)
            click.echo(f"{seconds:.1f} s of training; weights {out / 'model.pt'}, curves {out / 'curves.png'}")


def write_log(run: Run, file: Path) -> None:
    """The recipe, the machine and a row for each epoch, as JSON."""
    run_on = machine(run.place.device) | {"processes": str(run.place.world)}
    told = {"options": vars(run.o), "conditions": run_on, "epochs": run.rows}
    with files.replacing(file) as target:
        target.write_text(json.dumps(told, indent=1, default=str) + "\n")


def check(o: Any) -> None:
    """Refuse what cannot be, before the work."""
    files.pyplot()
    if o.pretrained and o.initial_checkpoint is not None:
        raise click.UsageError("choose one of --pretrained and --initial-checkpoint")
    if (o.mixup or o.cutmix) and o.batch_size % 2:
        raise click.UsageError("--mixup and --cutmix need an even --batch-size")
    if o.torchcompile_mode and not o.torchcompile:
        raise click.UsageError("--torchcompile-mode needs --torchcompile")
    if o.torchcompile_mode in GRAPHED and o.grad_accum_steps > 1:
        # The next micro-batch would write over the gradients of this one.
        raise click.UsageError(f"--torchcompile-mode {o.torchcompile_mode} takes no --grad-accum-steps")
    if o.r_warmup + o.r_off > o.epochs:
        raise click.UsageError(f"--r-warmup {o.r_warmup} and --r-off {o.r_off} are more than --epochs {o.epochs}")
    if o.resume is None and (o.output / "last.pt").exists():
        raise click.UsageError(f"{o.output / 'last.pt'} is there: --resume it, or choose another --output")


def option(name: str, default: Any, told: str, **kwargs: Any) -> Any:
    """One of the command line, whose default is told where it tells something."""
    return click.option(name, default=default, help=told, show_default=default not in (None, False), **kwargs)


COUNT, FROM_0, SHARE = click.IntRange(min=1), click.FloatRange(min=0), click.FloatRange(0, 1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OPTIONS = [
    click.argument("data_dir", metavar="DATA"),
    option("--model", "vit_small_patch16_224", "As tome bench takes it: a name of timm's, hf:, module:function."),
    option("--pretrained", False, "Begin with the weights that belong to the name.", is_flag=True),
    option("--initial-checkpoint", None, "Begin with the weights in a file.", type=FILE),
    option("--img-size", None, "Pixels: 448 or HEIGHTxWIDTH.", type=SizeType()),
    option("--crop-pct", None, "Share of the image in validation.", type=SHARE),
    option("--r", "0", "Schedule: 8 or 8,-1.0 or [8,8,4] or 0.05.", type=ScheduleType()),
    option("--r-warmup", 0, "Epochs in which r rises from 0.", type=click.IntRange(min=0)),
    option("--r-off", 0, "Last epochs, without merging.", type=click.IntRange(min=0)),
    option("--batch-size", 64, "Images of a process and a step.", type=COUNT),
    option("--grad-accum-steps", 1, "Steps of an update.", type=COUNT),
    option("--epochs", 10, "Of training; --cooldown-epochs come on top.", type=COUNT),
    option("--opt", "adamw", "Optimiser of timm's factory."),
    option("--lr", 1e-4, "Learning rate.", type=FROM_0),
    option("--weight-decay", 0.05, "Of the optimiser.", type=FROM_0),
    option("--momentum", 0.9, "Of the optimiser.", type=FROM_0),
    option("--layer-decay", None, "Factor of the learning rate from layer to layer.", type=SHARE),
    option("--clip-grad", None, "Largest norm of the gradient.", type=FROM_0),
    option("--sched", "cosine", "Scheduler of timm's factory.", type=click.Choice(SCHEDULERS)),
    option("--sched-on-updates", False, "Change the learning rate with each update.", is_flag=True),
    option("--warmup-epochs", 1, "Epochs in which the learning rate rises.", type=click.IntRange(min=0)),
    option("--warmup-lr", 1e-6, "The first learning rate.", type=FROM_0),
    option("--min-lr", 0.0, "The last learning rate.", type=FROM_0),
    option("--cooldown-epochs", 0, "Epochs with the last learning rate.", type=click.IntRange(min=0)),
    option("--decay-epochs", 30, "Of --sched step.", type=COUNT),
    option("--decay-rate", 0.1, "Of --sched step and multistep.", type=SHARE),
    option("--drop-path", 0.0, "Stochastic depth of the last block.", type=click.FloatRange(0, 1, max_open=True)),
    option("--smoothing", 0.1, "Of labels.", type=click.FloatRange(0, 1, max_open=True)),
    option("--mixup", 0.0, "Alpha of mixup.", type=FROM_0),
    option("--cutmix", 0.0, "Alpha of cutmix.", type=FROM_0),
    option("--no-aug", False, "Resize and crop only.", is_flag=True),
    option("--scale", (0.08, 1.0), "Area of random crops.", type=(SHARE, SHARE)),
    option("--hflip", 0.5, "Chance of a flip.", type=SHARE),
    option("--color-jitter", 0.4, "Strength.", type=FROM_0),
    option("--aa", None, "AutoAugment policy, such as rand-m9-mstd0.5-inc1."),
    option("--model-ema", False, "Average the weights.", is_flag=True),
    option("--model-ema-decay", 0.9998, "Of the average.", type=SHARE),
    option("--model-ema-warmup", False, "Let the decay grow.", is_flag=True),
    option("--amp", False, "Autocast to bfloat16.", is_flag=True),
    option("--torchcompile", False, "Compile the step.", is_flag=True),
    option("--torchcompile-mode", None, "reduce-overhead: replay CUDA graphs.", type=click.Choice(MODES)),
    option("--grad-checkpointing", False, "Compute activations again instead of keeping them.", is_flag=True),
    option("--fsdp", False, "Shard weights and optimiser over processes (FSDP2).", is_flag=True),
    option("--workers", 4, "Processes that read images.", type=click.IntRange(min=0)),
    option("--device", None, "cpu or cuda; the GPU if there is one.", type=DeviceType()),
    option("--seed", 42, "Of all that is drawn.", type=click.IntRange(min=0)),
    option("--output", "finetune_output", "Folder for all that is written.", type=click.Path(path_type=Path)),
    option("--resume", None, "last.pt of the run to go on with.", type=FILE),
]


@click.command(help="Fine-tune a model while its tokens merge.")
def command(**options: Any) -> None:
    """See finetune."""
    finetune(SimpleNamespace(**options))


for each in OPTIONS:
    command = each(command)


def main(args: list[str] | None = None) -> int:
    """Run the command line; a wrong argument ends in one line and exit code 2."""
    try:
        command.main(args, prog_name="finetune", standalone_mode=False)
    except click.ClickException as error:
        click.echo("finetune: error: " + " ".join(error.format_message().split()), err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("finetune: stopped; --resume with last.pt of --output goes on behind its last whole epoch", err=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
