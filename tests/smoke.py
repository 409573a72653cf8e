"""A wheel that was just installed does what it says, anywhere: python smoke.py WHEEL, outside of a checkout."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import timm
import torch
from jinja2 import Environment, PackageLoader

import tome
import tome_cuda

wheel = sys.argv[1]
assert "site-packages" in Path(tome.__file__).parts, tome.__file__
assert tome.__version__ == metadata.version("token-merging") == wheel.split("-")[1]
has_kernels = "manylinux" in wheel
assert bool(tome_cuda.build_info()) == has_kernels, tome_cuda.unavailable()
assert has_kernels or "Fix: TOME_BUILD_CUDA=1 " in tome_cuda.unavailable()

model = tome.patch.timm(timm.create_model("test_vit"))
model.r = 8
images = torch.randn(2, 3, 160, 160)
with torch.no_grad():
    assert model(images).shape == (2, 1000)
    assert tome.merged(model, images).x.shape[1] == 101 - 6 * 8
model(images).sum().backward()

for command, said in {"--version": tome.__version__, "info": "merge_add_norm", "bench --help": "--batch-size"}.items():
    told = subprocess.run([sys.executable, "-m", "tome", *command.split()], capture_output=True, text=True, check=True)
    assert said in told.stdout, command
PackageLoader("tome.cli").get_source(Environment(), "report.html")
python = sys.version.split()[0]
print(f"{wheel}: fine on Python {python}, torch {torch.__version__}", *tome_cuda.build_info().values(), sep="; ")
