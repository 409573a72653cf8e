"""The figures of the README's GPU tables: ``tome bench`` for each of RUNS, one JSON file a run in benchmarks/results.

    python benchmarks/headline.py [--only PART] [--out FOLDER]

``python benchmarks/tables.py`` then writes the tables and the plot.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import tome.cli

RESULTS = Path(__file__).parent / "results"
BASE = "vit_base_patch16_224"
HEADLINE = "--r 8 --r 8,-1.0 --r 16 --r 16,-1.0"
HALF = "--dtype float16 --device cuda"
SWEEP = " ".join(f"--r {r}" for r in (2, 4, 6, 8, 10, 12, 14, 16))
MODELS = {  # model: batch, and values of r whose saved arithmetic allows about 1.5x and 2x
    "vit_small_patch16_224": (512, 10, 16),
    "vit_large_patch16_224": (128, 5, 8),
    "vit_large_patch16_384": (64, 15, 23),
    "deit3_base_patch16_224": (256, 11, 16),
    "vit_base_patch14_dinov2": (32, 67, 105),
    "vit_so400m_patch14_siglip_224": (128, 6, 9),
}
RUNS = {
    "h200-base": f"{BASE} {HEADLINE} --batch-size 256 {HALF} --backend cuda",
    "h200-base-autocast": f"{BASE} {HEADLINE} --batch-size 256 --autocast float16 --device cuda --backend cuda",
    "h200-base-sweep": f"{BASE} {SWEEP} --batch-size 256 {HALF} --backend cuda --backend reference",
    "h200-base-compiled": f"{BASE} {HEADLINE} --batch-size 256 {HALF} --backend cuda --compile",
    **{
        f"h200-base-batch{batch}{suffix}": f"{BASE} --r 8 --r 16 --r 16,-1.0 --batch-size {batch} {HALF} "
        f"--backend cuda {option} --runs {runs}"
        for batch in (1, 8, 32, 64)
        for suffix, option, runs in (("", "", 61), ("-graph", "--cuda-graph", 31))
    },
    **{
        f"h200-{model}": f"{model} --r {low} --r {high} --batch-size {batch} {HALF} --backend cuda"
        for model, (batch, low, high) in MODELS.items()
    },
}


def main() -> None:
    """Run what was asked for, in one process: starting one takes longer than most runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--skip", default="no run", help="no runs whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name, arguments in RUNS.items():
        if options.only not in name or options.skip in name:
            continue
        start = time.perf_counter()
        print(f"tome bench {arguments}", flush=True)
        try:
            tome.cli.main(["bench", *arguments.split(), "--json", str(options.out / f"{name}.json")])
        except SystemExit as end:
            print(f"{name}: exit code {end.code}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
