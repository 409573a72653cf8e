"""What `tome tune` brings: DINOv2 ViT-S/14 with its real weights, calibrated on some photographs, tested on others.

    python benchmarks/tuned.py [--device cpu] [--sizes 224,518] [--batches 64,256] [--speedups 1.4,1.8] [--json FILE]

For each speed: the tuned schedule, and constant r and (r, -1) brought to its measured speed; the mean of 1 - cosine of
the class token to the unmerged model's, on other crops of the same photographs, on other photographs, and on digits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dinov2
import torch

import tome
from tome import evaluate, measure, tune
from tome.cli import files
from tome.tune.passes import Passes

RESULTS = Path(__file__).parent / "results"
SETS = ("other crops", "other photographs", "digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sizes", default="224,518")
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--speedups", default="1.4,1.8,2.4")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--images", type=int, default=256, help="to calibrate on, and of each set to test on")
    parser.add_argument("--passes", type=int, default=tune.PASSES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swap", action="store_true", help="calibrate on the photographs that are tested on, and back")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where others use the machine too")
    parser.add_argument("--json", type=Path, default=RESULTS / "tuned-dinov2.json")
    options = parser.parse_args()
    device = measure.checked_device(options.device)
    if options.cpu_time:
        measure.time.perf_counter = time.process_time  # type: ignore[attr-defined]
    ours, others = (dinov2.TEST, dinov2.CALIBRATION) if options.swap else (dinov2.CALIBRATION, dinov2.TEST)
    results: list[dict[str, Any]] = []
    for size in map(int, options.sizes.split(",")):
        host = dinov2.model(size).to(device, getattr(torch, options.dtype))
        images = {
            "calibration": dinov2.crops(ours, options.images, size, options.seed),
            "other crops": dinov2.crops(ours, options.images, size, options.seed + 1000),
            "other photographs": dinov2.crops(others, options.images, size, options.seed + 2000),
            "digits": dinov2.digits(options.images, size),
        }
        images = {name: x.to(device, getattr(torch, options.dtype)) for name, x in images.items()}
        for batch in map(int, options.batches.split(",")):
            if size > 224 and batch > 64:
                continue
            for speedup in map(float, options.speedups.split(",")):
                results += measured(host, images, tune.Wish("speedup", speedup), batch, options.passes)
                print(*(f"{row['name']} {row['speedup']:.3f}" for row in results[-3:]), flush=True)
    conditions = {"model": "DINOv2 ViT-S/14", "dtype": options.dtype, "seed": options.seed, "images": options.images}
    conditions["swapped"] = options.swap
    conditions |= {"clock": "CPU time" if options.cpu_time else "time", **measure.machine(device)}
    files.write_json(options.json, {"conditions": conditions, "results": results})
    print("size batch wish schedule  speed-up  " + "  ".join(SETS) + "  (and as parts of constant r's)  r")
    for i, row in enumerate(results):
        constant = results[i - i % 3]
        errors = "  ".join(f"{row[name]:.2e} ({row[name] / constant[name]:.2f})" for name in SETS)
        shown = row["r"] if row["name"] == "tuned" else ""
        print(row["size"], row["batch"], row["wish"], row["name"], f"{row['speedup']:.3f}x", errors, shown, sep="  ")


def measured(
    host: Any, images: dict[str, torch.Tensor], wish: tune.Wish, batch: int, passes: int
) -> list[dict[str, Any]]:
    """A row for constant r, (r, -1) and the tuned schedule."""
    start = time.perf_counter()
    found = tune.tune(host, images["calibration"], wish, batch, passes=passes)
    seconds = time.perf_counter() - start
    rows = [
        asdict(row) | {"size": images["digits"].shape[-1], "batch": batch, "wish": wish.value, "tuning_s": seconds}
        for row in found.rows[1:]
    ]
    for name in SETS:
        base = evaluate.Split(tome.unpatch(evaluate.twin(host, 0)), images[name][:1])
        test = Passes(evaluate.twin(base, 0), images[name], 16 if images[name].device.type == "cpu" else 64)
        for row in rows:
            row[name] = test.errors(row["r"]).distance
    return rows


if __name__ == "__main__":
    main()
