"""The code in the README and in the pages of docs, and a place in which it runs without a network."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

import tome

ROOT = Path(__file__).parents[1]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
FOR_A_GPU = re.compile(r"device=\"cuda|\.cuda\(")


def blocks(page: str, *languages: str) -> list[str]:
    """The code of a page in these languages."""
    return [textwrap.dedent(code) for _, language, code in FENCE.findall(PAGES[page]) if language in languages]


def commands(page: str) -> list[str]:
    """The command lines of a page, without comments."""
    lines = "\n".join(blocks(page, "sh", "")).replace("\\\n", " ").splitlines()
    told = (line.partition("  #")[0].strip() for line in lines)
    return [line for line in told if re.match(r"(tome|python|torchrun|nox|pip|\w+=\S+ \w+) \S", line)]


def words(command: str) -> list[str]:
    """Of a command line, without variables."""
    return [word for i, word in enumerate(shlex.split(command)) if i or "=" not in word]


def run(page: str, on_a_gpu: bool) -> dict[str, Any]:
    """Run the Python blocks of a page in their order; those for a GPU only there."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if on_a_gpu or not FOR_A_GPU.search(block):
            exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name in it, and models with random weights in the place of downloaded ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 48), (60 * i, 90, 200)).save(tmp_path / "photos" / f"{i}.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.jpg")
    (tmp_path / "tuned.json").write_text(json.dumps({"r": [8] * 12}))
    monkeypatch.setattr(tome.backend, "_process", tome.get_backend())  # a page sets it
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))
    _without_downloads(monkeypatch)
    return tmp_path


def _without_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library is missing the page that needs it is skipped by its own import."""
    try:
        import open_clip
        import test_diffusers
        import torchvision
        import transformers
        from diffusers import StableDiffusionPipeline
    except ImportError:
        return
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    vit = transformers.ViTForImageClassification(config)
    tower = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64)
    create = open_clip.create_model_and_transforms
    for owner, name, stand_in in (
        (transformers.AutoModelForImageClassification, "from_pretrained", lambda *args, **kwargs: vit),
        (StableDiffusionPipeline, "from_pretrained", lambda *args, **kwargs: test_diffusers.pipeline()),
        (torchvision.models, "vit_b_16", lambda weights: tower),
        (open_clip, "create_model_and_transforms", lambda name, pretrained: create(name)),
    ):
        monkeypatch.setattr(owner, name, stand_in)
