"""Small models that the programs in examples/ find by name, pictures for them, and what the programs print."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}  # 65 tokens
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cow": (30, 30, 200)}


def vit():
    """A model that a program finds by the name ``programs:vit``."""
    model = VisionTransformer(num_classes=3, **SMALL)
    model.pretrained_cfg = CONFIG | {"input_size": (3, 32, 32)}
    return model


def digits_vit():
    model = VisionTransformer(**SMALL | {"img_size": 16, "in_chans": 1, "num_classes": 10, "depth": 3})
    model.pos_embed.data.normal_(std=0.5)
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "input_size": (1, 16, 16)}
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a folder of noisy pictures of one colour for each class."""
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(5):
            noise = np.random.default_rng(i).integers(-30, 30, (40, 60, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def run(program, *arguments):
    """The lines that a program prints."""
    result = CliRunner().invoke(program.main, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()
