"""Images to evaluate a model on: opened by a name, read in the background, and none counted twice.

``open_images`` knows four kinds of DATA:

=====================  ============================================================================================
a folder of folders    each is a class, whose images may lie in folders of their own (as torchvision's ImageFolder)
a folder of images     no labels
a name of torchvision  of ``torchvision.datasets``, its test or validation split, in ``root``; never downloaded
``digits``             scikit-learn's handwritten digits, the quarter that ``benchmarks/demo.py`` tests on; no network
=====================  ============================================================================================

A folder that has one of the names is written with a slash: ``./digits``. Hidden files are not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from tome import cost
from tome.patch.model import patched_in

Transform = Callable[[Image.Image], Tensor]


class DataError(ValueError):
    """There are no such images; the message says what was looked for, and what was expected."""


class Source(Protocol):
    """Images as they are stored."""

    classes: list[str] | None  # by label; None: there are no labels
    ignored: list[str]  # files beside the images that are none

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call image i in a message."""

    def checksum(self) -> int:
        """A number that tells them from others: of their names where they have some, else how many there are."""

    def read(self, i: int) -> tuple[Image.Image, int]:
        """Image i and its label, -1 if it has none; raises whatever a broken image makes PIL raise."""


class Broken(NamedTuple):
    """In the place of an image that cannot be read."""

    name: str
    position: int


class ImageDataset(Dataset[Any]):
    """Item i is (what ``transform`` makes of the image, label or -1, i), or :class:`Broken`.

    With a limit the images are spread evenly over the source, and so over its classes.
    """

    def __init__(self, source: Source, transform: Transform, limit: int | None = None) -> None:
        self.source, self.transform = source, transform
        self.length = len(source) if limit is None else min(limit, len(source))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Tensor, int, int] | Broken:
        at = i * len(self.source) // self.length
        try:
            image, label = self.source.read(at)
        except Exception as error:  # PIL and zlib raise whatever broken bytes lead them to
            reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
            return Broken(f"{self.source.name(at)} ({reason})", i)
        return self.transform(image), label, i


class Images(NamedTuple):
    """What :func:`open_images` gives."""

    dataset: ImageDataset
    classes: list[str] | None
    name: str

    @classmethod
    def of(cls, source: Source, transform: Transform, name: str, limit: int | None = None) -> Images:
        """Of a source; the rest as :func:`open_images` takes it."""
        return cls(ImageDataset(source, transform, limit), source.classes, name)


def open_images(data: str, transform: Transform, root: Path | None = None, limit: int | None = None) -> Images:
    """Open images by a name.

    Args:
        data: a folder, ``digits`` or a name of ``torchvision.datasets``.
        transform: makes of a PIL image what a model takes, such as :func:`pixels`.
        root: where torchvision's dataset lies.
        limit: take no more images than this, spread over all.

    Raises:
        DataError: there are none of that name, or not in a form that is understood.

    """
    from tome import datasets

    source = datasets.find(data, root)
    return Images.of(source, transform, data, limit)


class Pixels:
    """A PIL image as uint8 [C, H, W], resized and cropped as timm does for evaluation.

    Bytes travel from the loader's processes to the device, where :meth:`normalised` makes of them what a model takes.

    Args:
        config: what :func:`timm.data.create_transform` takes: input_size, mean, std, interpolation, crop_pct,
            crop_mode.

    """

    def __init__(self, config: dict[str, Any]) -> None:
        from timm.data import create_transform

        channels = config["input_size"][0]
        if channels not in (1, 3):
            raise DataError(f"the model takes images of {channels} channels; there are only ones of 1 or 3")
        self.mode = "L" if channels == 1 else "RGB"
        numbers = {name: tuple(_channels(config[name], channels).tolist()) for name in ("mean", "std")}
        self.config = {**config, **numbers}
        self.to_bytes = create_transform(**self.config, is_training=False, use_prefetcher=True)

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.as_tensor(self.to_bytes(image.convert(self.mode)))

    def normalised(self, x: Tensor) -> Tensor:
        """Float32 of bytes [B, C, H, W]."""
        mean, std = (_on(self.config[name], x.device) for name in ("mean", "std"))
        return x.float().div_(255).sub_(mean).div_(std)


@functools.cache
@torch.inference_mode(False)
def _on(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1]. Kept, as a copy to a GPU makes the host wait for all that runs there."""
    return torch.tensor(numbers, device=device).view(-1, 1, 1)


def pixels(
    model: nn.Module, told: dict[str, Any] | None = None, size: tuple[int, int, int] | None = None, **overrides: Any
) -> Pixels:
    """How a model wants its images.

    Args:
        model: of any library, patched or not.
        told: what its library says of its images, in the words of :func:`timm.data.create_transform`; timm's models
            say it themselves.
        size: channels, height and width; None for the model's own.
        overrides: takes precedence, in the same words, where it is not None.

    """
    from timm.data import resolve_model_data_config

    chosen = {key: value for key, value in overrides.items() if value is not None}
    inner = patched_in(model) or model
    size = size or cost.input_size(model)
    return Pixels({**resolve_model_data_config(inner), **(told or {}), **chosen, "input_size": size})


class Batch(NamedTuple):
    """Some images on the device."""

    x: Tensor  # [B, C, H, W]
    label: Tensor  # int64 [B], -1 without one
    index: Tensor  # type: ignore[assignment]  # int64 [B], on the CPU: their places in the dataset
    broken: list[str]  # those that cannot be read, by name and reason, are not among the B
    positions: list[int]  # of all, broken ones included


def batches(
    images: Images,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Read all images once, in their order, with a few batches in memory at a time.

    Args:
        images: of :func:`open_images`.
        batch_size: images of a batch; the last may be smaller, and so is one with broken images.
        workers: processes that read ahead; with 0 images are read when they are asked for.
        device: where they go.
        rank: of ``world`` processes the one that this is; it reads every ``world``-th batch, so that batches, and what
            depends on them in the last digit, are those of one process.
        world: how many processes share the images.
        order: places in the dataset to read instead of all.

    """
    every = range(len(images.dataset)) if order is None else order
    transform = images.dataset.transform
    loader = DataLoader(
        images.dataset,
        batch_sampler=_Chunks(every, batch_size, rank, world),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        x, label = (part.to(device, non_blocking=True) for part in (batch.x, batch.label))
        if isinstance(transform, Pixels) and len(x):
            x = transform.normalised(x)
        yield batch._replace(x=x, label=label)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images [N, 1, 16, 16] in [-1, 1], labels [N]) of scikit-learn's digits, for training and for testing.

    Raises:
        DataError: scikit-learn is not installed.

    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("digits come with scikit-learn: pip install 'token-merging[evaluate]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=data.target)
    return (images[train], labels[train]), (images[test], labels[test])


class _Chunks:
    """The places of each batch of one process."""

    def __init__(self, every: Sequence[int], batch_size: int, rank: int, world: int) -> None:
        self.every, self.batch_size = every, batch_size
        self.starts = range(rank * batch_size, len(every), world * batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.every[start : start + self.batch_size]) for start in self.starts)


def _collate(items: list[tuple[Tensor, int, int] | Broken]) -> Batch:
    whole = [item for item in items if not isinstance(item, Broken)]
    x = default_collate([item[0] for item in whole]) if whole else torch.empty(0)
    label, index = (torch.tensor([item[i] for item in whole], dtype=torch.int64) for i in (1, 2))
    broken = [item.name for item in items if isinstance(item, Broken)]
    return Batch(x, label, index, broken, [item[-1] for item in items])


def _channels(values: Sequence[float] | float, channels: int) -> Tensor:
    """One value a channel; grey ones are the mean of those of colours."""
    given = torch.as_tensor(values, dtype=torch.float32).flatten()
    return given if len(given) == channels else given.mean().expand(channels).clone()


__all__ = ["Batch", "Broken", "DataError", "Images", "Pixels", "batches", "digits", "open_images", "pixels"]
