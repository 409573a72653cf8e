"""The table of training: forward and backward passes of a ViT, merging and not, against the unpatched model.

    python benchmarks/training.py [--model NAME] [--batch-size 128] [--json FILE] [--modes eager step compiled graphs]

bfloat16 autocast, gradients of all parameters. Unpatched and patched models are timed in turns, in each mode against
their own unpatched one, and ROW passes at a time: as in training, the host runs ahead of the GPU. ``step`` is a whole
step of training, with stochastic depth of 0.1, clipped gradients and a fused AdamW; ``graphs`` is compiled with the
mode reduce-overhead, which replays CUDA graphs. Memory is the most that a pass takes beside parameters and gradients.
Rows of other modes that FILE holds stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tome
from tome import cost, measure

RESULTS = Path(__file__).parent / "results"
ROW = 5
MODES = {"eager": None, "step": None, "compiled": None, "graphs": "reduce-overhead"}  # as torch.compile names them
SCHEDULES: tuple[Any, ...] = (None, 0, 8, 16, (16, -1.0))  # None: unpatched


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path, default=RESULTS / "h200-training.json")
    options = parser.parse_args()
    device = measure.checked_device(options.device)
    conditions = {"model": options.model, "batch size": str(options.batch_size), "dtype": "bfloat16 autocast"}
    conditions |= measure.machine(device)
    stored = json.loads(options.json.read_text()) if options.json.exists() else {"results": []}
    results: list[dict[str, Any]] = [row for row in stored["results"] if row["mode"] not in options.modes]
    if results and stored["conditions"] != conditions:
        raise SystemExit(f"{options.json} holds rows of another machine, model or batch: measure all --modes")
    for mode in options.modes:
        rows = measured(options.model, options.batch_size, mode, device, options.runs)
        for row in rows:
            print(
                *(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), sep="\t", flush=True
            )
        results += rows
        options.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def measured(name: str, batch: int, mode: str, device: torch.device, runs: int) -> list[dict[str, Any]]:
    """A row for each schedule."""
    torch.manual_seed(0)
    whole = timm.create_model(name, drop_path_rate=0.1 if mode == "step" else 0.0).to(device).train()
    x = torch.randn(batch, *cost.input_size(whole), device=device)
    labels = torch.randint(1000, (batch,), device=device)
    calls: dict[str, measure.Call] = {}
    flops = {}
    for r in (r for r in SCHEDULES if r != 0 or mode == "eager"):
        model: Any = copy.deepcopy(whole)
        flops[str(r)] = cost.flops(whole, r or 0)
        if r is not None:
            tome.patch.timm(model).r = r
        run = torch.compile(model, mode=MODES[mode]) if mode in ("compiled", "graphs") else model
        calls[str(r)] = _step(model, x, labels) if mode == "step" else _passes(model, run, x, labels)
    rows = {r: _in_a_row(call) for r, call in calls.items()}
    seconds = measure.time_calls(rows, device, warm_up=1, runs=runs, progress=False)
    # What graphs use is theirs for good.
    memory = {r: None if mode == "graphs" else measure.peak_memory(call, device) / 2**30 for r, call in calls.items()}
    medians = {r: statistics.median(times) / ROW for r, times in seconds.items()}
    return [
        {
            "mode": mode,
            "r": "none" if r == "None" else r,
            "images_per_second": batch / medians[r],
            "median_ms": 1e3 * medians[r],
            "speedup": medians["None"] / medians[r],
            "allowed": flops["None"] / flops[r],
            "peak_gib": memory[r],
        }
        for r in calls
    ]


def _in_a_row(call: measure.Call) -> measure.Call:
    def calls() -> None:
        for _ in range(ROW):
            call()

    return calls


def _passes(model: nn.Module, run: Callable[..., Tensor], x: Tensor, labels: Tensor) -> measure.Call:
    @torch.inference_mode(False)
    def call() -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(run(x), labels)
            loss.backward()

    return call


def _step(model: nn.Module, x: Tensor, labels: Tensor) -> measure.Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    passes = _passes(model, model, x, labels)

    @torch.inference_mode(False)
    def call() -> None:
        passes()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return call


if __name__ == "__main__":
    main()
