"""What a name of images stands for (:func:`tome.data.open_images`): folders, torchvision's datasets, digits."""

from __future__ import annotations

import difflib
import inspect
import operator
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from tome.data import DataError, Source, digits

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
EXPECTED = (
    "expected a folder of images, a folder with a folder of images for each class, a dataset of torchvision's with "
    "its --root, or digits"
)


def find(data: str, root: Path | None) -> Source:
    """The images of a name.

    Raises:
        DataError: there are none.

    """
    if data == "digits":
        return Digits()
    path = Path(data)
    if root is None and (path.exists() or os.sep in data):
        return Folder(path)
    if root is not None and not root.is_dir():
        raise DataError(f"there is no folder {root} for the dataset {data}")
    return TorchvisionDataset(data, root)


class Names:
    """Many strings in one: a process that is forked shares it, whereas counting references copies a list."""

    def __init__(self, names: Iterable[str]) -> None:
        joined, self.ends = bytearray(), array("Q", [0])
        for name in names:
            joined += os.fsencode(name)
            self.ends.append(len(joined))
        self.joined = bytes(joined)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.joined[self.ends[i] : self.ends[i + 1]])


class Folder:
    """Images in a folder, or in a folder for each class."""

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise DataError(f"there is no folder {folder}: {EXPECTED}")
        if not folder.is_dir():
            raise DataError(f"{folder} is a file: {EXPECTED}")
        self.folder, self.labels, self.ignored = folder, array("l"), list[str]()
        inside = _listed(folder)
        folders = sorted(entry.name for entry in inside if entry.is_dir())
        loose = sorted(entry.name for entry in inside if not entry.is_dir())
        own = list(self._images(loose))
        self.classes = None if own or not folders else folders
        if self.classes is None:
            deeper = next((each for each in folders if any(map(_is_image, _walk(folder, each)))), None)
            if deeper is not None:
                raise DataError(f"{folder} has images ({own[0]}, ...) beside those of its folder {deeper}: {EXPECTED}")
            self.names = Names(own)
            self.labels.extend([-1] * len(own))
        else:
            self.names = Names(self._of_classes(self.classes))
        if not len(self.names):
            others = f", but {len(self.ignored)} other files ({self.ignored[0]}, ...)" if self.ignored else ""
            raise DataError(f"there are no images in {folder}{others}: {EXPECTED}")

    def _images(self, files: Iterable[str]) -> Iterator[str]:
        for file in files:
            if _is_image(file):
                yield file
            else:
                self.ignored.append(file)

    def _of_classes(self, classes: list[str]) -> Iterator[str]:
        for label, name in enumerate(classes):
            before = len(self.labels)
            for file in self._images(_walk(self.folder, name)):
                self.labels.append(label)
                yield file
            if len(self.labels) == before:
                raise DataError(f"the class {name} of {self.folder} is empty: expected images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """The path."""
        return str(self.folder / self.names[i])

    def checksum(self) -> int:
        """Of the names."""
        return zlib.crc32(self.names.joined)

    def read(self, i: int) -> tuple[Image.Image, int]:
        """Decoded."""
        with Image.open(self.folder / self.names[i]) as image:
            return image.copy(), self.labels[i]


class Numbered:
    """Images without names of their own."""

    kind: str

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The number among those of its kind."""
        return f"{self.kind}[{i}]"

    def checksum(self) -> int:
        """How many there are."""
        return len(self)


class TorchvisionDataset(Numbered):
    """One of ``torchvision.datasets`` that has an image and a class for each item, as it lies on the disk."""

    def __init__(self, name: str, root: Path | None) -> None:
        from torchvision import datasets

        kind = getattr(datasets, name, None) if name.isidentifier() else None
        if kind is None or not issubclass(kind, datasets.VisionDataset):
            near = difflib.get_close_matches(name, datasets.__all__, n=1)
            mend = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"there is no folder {name}, and torchvision has no such dataset{mend}: {EXPECTED}")
        asked = inspect.signature(kind).parameters
        if root is None and "root" in asked and asked["root"].default is inspect.Parameter.empty:
            raise DataError(f"{name} is a dataset of torchvision's: give the folder in which it lies by --root")
        options: dict[str, Any] = {key: False for key in ("download", "train") if key in asked}
        if root is not None and "root" in asked:
            options["root"] = str(root)
        splits = ({"split": "test"}, {"split": "val"}) if "split" in asked else ({},)
        self.kind, self.ignored, self.dataset = name, list[str](), _opened(name, kind, options, splits)
        if not len(self.dataset):
            raise DataError(f"{name} in {root} has no images")
        with suppress(OSError):  # a broken image is a matter of its own
            image, label = _pair(self.dataset[0])
            if not isinstance(image, Image.Image) or not hasattr(label, "__index__"):
                raise DataError(f"{name} is not an image and a class for each item: choose another dataset")
        self.classes: list[str] | None = _classes(self.dataset)
        if self.classes is None:
            raise DataError(f"{name} does not say what its classes are: choose another dataset")

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> tuple[Image.Image, int]:
        """As the dataset gives it."""
        image, label = self.dataset[i]
        return image, operator.index(label)


class Digits(Numbered):
    """The digits of :func:`tome.data.digits`, those for testing unless told otherwise, grey images of 16 x 16."""

    kind = "digits"

    def __init__(self, train: bool = False) -> None:
        images, labels = digits()[0 if train else 1]
        self.images = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
        self.labels = labels.tolist()
        self.classes: list[str] | None = [str(i) for i in range(10)]
        self.ignored = list[str]()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> tuple[Image.Image, int]:
        """Grey."""
        return Image.fromarray(self.images[i]), self.labels[i]


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(error) from error


def _walk(folder: Path, name: str) -> Iterator[str]:
    """The files within a folder, relative to the one that it is in, in the order of their paths."""

    def fail(error: OSError) -> None:
        raise _unreadable(error) from error

    for home, folders, files in os.walk(folder / name, onerror=fail, followlinks=True):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                yield os.path.relpath(os.path.join(home, file), folder)


def _unreadable(error: OSError) -> DataError:
    return DataError(f"cannot read {error.filename}: {error.strerror}")


def _opened(name: str, kind: Any, options: dict[str, Any], splits: Iterable[dict[str, str]]) -> Any:
    errors: list[Exception] = []
    for split in splits:
        try:
            return kind(**options, **split)
        except Exception as error:  # each dataset has its own for what is not there
            errors.append(error)
    reason = (str(errors[-1]) or type(errors[-1]).__name__).strip().splitlines()[0]
    where = f" in {options['root']}" if "root" in options else ""
    raise DataError(f"torchvision cannot open {name}{where} ({reason}); nothing is downloaded here") from errors[-1]


def _pair(item: Any) -> tuple[Any, Any]:
    return item if isinstance(item, tuple) and len(item) == 2 else (None, None)


def _classes(dataset: Any) -> list[str] | None:
    for attribute in ("classes", "categories"):
        found = getattr(dataset, attribute, None)
        if found is not None:
            return [each if isinstance(each, str) else ", ".join(each) for each in found]
    count = getattr(dataset, "num_classes", None)
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if count is None and labels is not None:
            count = 1 + max(int(label) for label in labels)
    return None if count is None else [str(i) for i in range(count)]
