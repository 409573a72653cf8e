"""What merging changes in DINOv2 ViT-S/14 with its real weights, on crops of photographs, and how fast it is.

    OMP_NUM_THREADS=1 python benchmarks/agreement.py --device cpu
    python benchmarks/agreement.py --device cuda --dtype float16 --batch-size 256 --crops 1024

`tome evaluate` on crops of the sixteen photographs of benchmarks/dinov2.py: the cosine of the class token with the
unpatched model's, and images/s of both in one run; then the cosine where attention knows no sizes. Figures go to
benchmarks/results/agreement-dinov2-DEVICE.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import dinov2
import torch

from tome import patch, schedule

RESULTS = Path(__file__).parent / "results"
PHOTOGRAPHS = (*dinov2.CALIBRATION, *dinov2.TEST)
SCHEDULES = ("0", "4", "8", "12", "16", "20", "8,-1.0", "12,-1.0", "16,-1.0")
WITHOUT_SIZES: tuple[schedule.Schedule, ...] = (8, 16, 20)
COUNT = 128  # of crops to compare with and without sizes


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--crops", type=int, default=128, show_default=True)
def main(device: str, dtype: str, batch_size: int, crops: int) -> None:
    """Measure and store."""
    file = RESULTS / f"agreement-dinov2-{device}.json"
    with tempfile.TemporaryDirectory() as folder:
        for i, crop in enumerate(dinov2.cropped(PHOTOGRAPHS, crops)):
            crop.save(Path(folder) / f"{i:04}.png")
        command = [sys.executable, "-m", "tome", "evaluate", "benchmarks.dinov2:model", "--data", folder]
        command += [word for r in SCHEDULES for word in ("--r", r)]
        command += ["--device", device, "--dtype", dtype, "--batch-size", str(batch_size), "--workers", "0"]
        subprocess.run([*command, "--json", str(file)], check=True)
    stored = json.loads(file.read_text())
    stored["conditions"]["data"] = f"{crops} crops of the photographs of benchmarks/dinov2.py"
    stored["sizes"] = sizes(device, getattr(torch, dtype), batch_size)
    file.write_text(json.dumps(stored, indent=2) + "\n")


@torch.inference_mode()
def sizes(device: str, dtype: torch.dtype, batch_size: int) -> list[dict[str, Any]]:
    """The mean cosine with the unpatched model's class token, with sizes in attention and without."""
    images = dinov2.crops(PHOTOGRAPHS, COUNT).to(device, dtype).split(batch_size)
    unpatched = dinov2.model().to(device, dtype)
    plain = [unpatched(x).float() for x in images]
    rows = []
    for r in WITHOUT_SIZES:
        row: dict[str, Any] = {"r": r}
        for name, weighs in (("with", True), ("without", False)):
            merging: Any = patch.timm(dinov2.model().to(device, dtype), prop_attn=weighs)
            merging.r = r
            cosines = [
                torch.cosine_similarity(merging(x).float(), y, dim=-1) for x, y in zip(images, plain, strict=True)
            ]
            row[name] = torch.cat(cosines).mean().item()
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
