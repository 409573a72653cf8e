"""Images by name, and the loader that reads them."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from tome import data

CPU = torch.device("cpu")


def picture(file, size=(20, 30), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def as_it_is(image):
    return torch.as_tensor(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def classes(tmp_path):
    """Four classes with 1, 2, 3 and 4 images."""
    pixels = []
    for label, name in enumerate(("ant", "bee", "cow", "dog")):
        for i in range(label + 1):
            deeper = "deeper/" if i == 2 else ""
            pixels.append((label, picture(tmp_path / name / f"{deeper}{i}.png", seed=10 * label + i)))
    (tmp_path / "ant" / "notes.txt").write_text("of ants")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "bee" / "._0.png").write_text("of a Mac")
    return tmp_path, pixels


def read(images, batch_size=4, **options):
    return list(data.batches(images, batch_size, options.pop("workers", 0), CPU, **options))


def test_folders_of_classes(classes):
    folder, pixels = classes
    images = data.open_images(str(folder), as_it_is)
    assert (images.classes, images.name) == (["ant", "bee", "cow", "dog"], str(folder))
    assert images.dataset.source.ignored == ["ant/notes.txt"]
    batches = read(images)
    assert [len(batch.x) for batch in batches] == [4, 4, 2]
    x, label, index = (torch.cat([batch[i] for batch in batches]) for i in range(3))
    assert index.tolist() == list(range(10))
    assert [batch.positions for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert label.tolist() == sorted(label for label, _ in pixels)
    expected = {(label, array.tobytes()) for label, array in pixels}
    found = {(int(each), part.permute(1, 2, 0).numpy().tobytes()) for each, part in zip(label, x, strict=True)}
    assert found == expected
    assert images.dataset.source.name(0) == str(folder / "ant" / "0.png")


def test_a_folder_without_classes(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.PNG", seed=i)
    (tmp_path / "raw").mkdir()
    images = data.open_images(str(tmp_path), as_it_is)
    (batch,) = read(images)
    assert images.classes is None
    assert (batch.label.tolist(), batch.index.tolist()) == ([-1, -1, -1], [0, 1, 2])


def test_a_limit_is_spread_over_the_classes(classes):
    images = data.open_images(str(classes[0]), as_it_is, limit=5)
    (batch,) = read(images, 8)
    assert (batch.label.tolist(), batch.index.tolist()) == ([0, 1, 2, 3, 3], [0, 1, 2, 3, 4])
    assert len(data.open_images(str(classes[0]), as_it_is, limit=99).dataset) == 10


def test_digits_are_those_of_the_demonstration():
    pytest.importorskip("sklearn")
    config = {"input_size": (1, 16, 16), "mean": 0.5, "std": 0.5, "crop_pct": 1.0, "interpolation": "bicubic"}
    images = data.open_images("digits", data.Pixels(config))
    (batch,) = read(images, 1000)
    (_, _), (expected, labels) = data.digits()
    assert torch.equal(batch.label, labels)
    torch.testing.assert_close(batch.x, expected, atol=1 / 250, rtol=0)
    assert len(images.classes) == 10


def test_a_dataset_of_torchvision(tmp_path):
    pytest.importorskip("torchvision")
    images = data.open_images("FakeData", as_it_is, limit=6)
    (batch,) = read(images, 6)
    assert batch.x.shape == (6, 3, 224, 224)
    assert len(images.classes) == 10
    picture(tmp_path / "ant" / "0.png")
    assert data.open_images("ImageFolder", as_it_is, tmp_path).classes == ["ant"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_reading_does_not_wait_for_the_gpu(tmp_path):
    """The first batch brings what is kept; after it the host may run ahead."""
    for i in range(6):
        picture(tmp_path / f"{i}.png", (200, 300))
    images = data.open_images(str(tmp_path), data.pixels(timm.create_model("test_vit")))
    read = data.batches(images, 2, 0, torch.device("cuda"))
    next(read)
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert len(list(read)) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pixels_are_timms_to_the_bit(tmp_path):
    model = timm.create_model("test_vit")
    picture(tmp_path / "photo.png", (200, 300))
    with Image.open(tmp_path / "photo.png") as image:
        photo = image.convert("RGB")
    config = resolve_model_data_config(model)
    expected = create_transform(**config, is_training=False)(photo)
    pixels = data.pixels(model)
    assert torch.equal(pixels.normalised(pixels(photo)[None])[0], expected)
    changed = data.pixels(
        model, {"crop_pct": 0.5, "std": (2.0, 2.0, 2.0)}, mean=(0.1, 0.2, 0.3), std=None, crop_pct=0.9
    )
    config |= {"crop_pct": 0.9, "mean": (0.1, 0.2, 0.3), "std": (2.0, 2.0, 2.0)}
    expected = create_transform(**config, is_training=False)(photo)
    torch.testing.assert_close(changed.normalised(changed(photo)[None])[0], expected)
    with pytest.raises(data.DataError, match="4 channels"):
        data.Pixels({**config, "input_size": (4, 16, 16)})


def test_broken_images_are_named_and_left_out(tmp_path, monkeypatch):
    for i in range(4):
        picture(tmp_path / f"{i}.png", seed=i)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_text("text")
    (tmp_path / "2a.png").write_bytes(b"")
    images = data.open_images(str(tmp_path), as_it_is)
    first, second = read(images, 3)
    assert (first.index.tolist(), first.positions, len(first.x)) == ([0], [0, 1, 2], 1)
    assert [name.split(" (")[0] for name in first.broken] == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    assert (second.index.tolist(), second.positions, len(second.broken)) == ([4], [3, 4], 1)
    (none,) = read(images, 2, order=[1, 2])
    assert (len(none.x), len(none.label), len(none.broken)) == (0, 0, 2)
    (tmp_path / "0.png").unlink()
    (batch,) = read(images, 1, order=[0])
    assert batch.broken == [f"{tmp_path / '0.png'} (No such file or directory)"]


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_processes_share_the_batches_of_one(classes, world):
    images = data.open_images(str(classes[0]), as_it_is)
    alone = read(images, 3)
    shares = [read(images, 3, rank=rank, world=world) for rank in range(world)]
    together = [batch for step in range(4) for share in shares for batch in share[step : step + 1]]
    assert [batch.positions for batch in together] == [batch.positions for batch in alone]
    assert all(torch.equal(a.x, b.x) for a, b in zip(alone, together, strict=True))


def test_workers_neither_lose_nor_reorder(classes):
    code = (
        "import sys, torch, test_data\nfrom tome import data\n"
        "images = data.open_images(sys.argv[1], test_data.as_it_is)\n"
        "found = list(data.batches(images, 3, 2, torch.device('cpu'), order=[9, 3, 1, 0, 4]))\n"
        "alone = list(data.batches(images, 3, 0, torch.device('cpu'), order=[9, 3, 1, 0, 4]))\n"
        "assert all(torch.equal(a.x, b.x) for a, b in zip(found, alone, strict=True))\n"
        "print([b.positions for b in found])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, classes[0]], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )  # fmt: skip
    assert result.stdout == "[[9, 3, 1], [0, 4]]\n", result.stderr


class Made:
    """As many images as one likes, none of which is stored."""

    classes, ignored = None, ()

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, i):
        return Image.fromarray(np.full((64, 64, 3), i % 251, dtype=np.uint8)), -1


def test_memory_does_not_grow_with_the_images():
    def peak(count):
        images = data.Images(data.ImageDataset(Made(count), as_it_is), None, "made")
        tracemalloc.start()
        try:
            seen = sum(len(batch.x) for batch in data.batches(images, 8, 0, CPU))
            assert seen == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(80)
    small, large = peak(80), peak(1600)
    assert large < small + 100_000  # of 20 MB of pixels more


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("nowhere/at/all", None, "there is no folder nowhere/at/all: expected a folder of images, a folder with"),
        ("CIFAR1", None, "there is no folder CIFAR1, and torchvision has no such dataset; did you mean CIFAR10"),
        ("CIFAR10", None, "CIFAR10 is a dataset of torchvision's: give the folder in which it lies by --root"),
        ("CIFAR10", "empty", "torchvision cannot open CIFAR10 in empty (Dataset not found or corrupted."),
        ("CIFAR10", "nowhere", "there is no folder nowhere for the dataset CIFAR10"),
        ("empty", None, "there are no images in empty: expected"),
        ("file.png", None, "file.png is a file: expected"),
        ("texts", None, "there are no images in texts, but 1 other files (a.txt, ...): expected"),
        ("holed", None, "the class bee of holed is empty: expected images (.bmp"),
        ("mixed", None, "mixed has images (0.png, ...) beside those of its folder ant: expected"),
        ("locked", None, "cannot read locked/ant: Permission denied"),
    ],
)
def test_what_cannot_be_opened(name, root, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "texts", "holed/bee"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("a")
    for file in ("file.png", "holed/ant/0.png", "mixed/0.png", "mixed/ant/0.png", "locked/ant/0.png"):
        picture(tmp_path / file)
    listed = os.scandir

    def scandir(folder):
        if str(folder).endswith("locked/ant"):  # who tests may be root, who reads everything
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(data.DataError) as raised:
        data.open_images(name, as_it_is, root and tmp_path.relative_to(tmp_path) / root)
    assert str(raised.value).startswith(message)


def test_a_dataset_without_classes_is_refused(monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Masks(datasets.VisionDataset):
        def __init__(self):
            pass

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return Image.new("RGB", (2, 2)), Image.new("L", (2, 2))

    monkeypatch.setattr(datasets, "Masks", Masks, raising=False)
    with pytest.raises(data.DataError, match="Masks is not an image and a class for each item"):
        data.open_images("Masks", as_it_is)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match=r"pip install 'token-merging\[evaluate\]'"):
        data.open_images("digits", as_it_is)
