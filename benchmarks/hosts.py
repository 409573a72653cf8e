"""The table of hosts: models of each library against the faster of themselves unpatched, eager and compiled.

    python benchmarks/hosts.py [--only PART] [--out FOLDER] [--device cuda:0] [--no-compile]

One JSON file a model in benchmarks/results, written when it is measured; ``python benchmarks/tables.py`` then writes
the table. Weights are random: they don't change what a pass costs. The unpatched model eager and compiled and the
patched one eager are measured in one process; a schedule spreads its merges evenly over the layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tome
from tome import cost, measure

RESULTS = Path(__file__).parent / "results"


class Host(NamedTuple):
    """A row of the table: how the model is made, and what it is fed."""

    make: Callable[[], nn.Module]
    batch: int
    size: tuple[int, ...]  # of one input
    low: float  # tokens merged a layer, on average, that save 1.5x
    high: float  # and 2x


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of timm."""

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **options)
        return model

    return make


def transformers_model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers by the names of its class and configuration."""

    def make() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
        return model

    return make


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    """A model of torchvision."""

    def make() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)()
        return model

    return make


def open_clip_tower(name: str) -> Callable[[], nn.Module]:
    """The vision tower of a model of open_clip."""

    def make() -> nn.Module:
        import open_clip

        tower: nn.Module = open_clip.create_model(name, pretrained=None).visual
        return tower

    return make


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
HOSTS = {
    "transformers-vit-b16-224": Host(
        transformers_model("ViTForImageClassification", "ViTConfig"), 256, (3, 224, 224), 10.5, 15.9
    ),
    "transformers-clip-l14-224": Host(
        transformers_model("CLIPVisionModel", "CLIPVisionConfig", **LARGE, patch_size=14, projection_dim=768),
        *(128, (3, 224, 224), 6.9, 10.5),
    ),
    "transformers-siglip-so400m-384": Host(
        transformers_model("SiglipVisionModel", "SiglipVisionConfig", **SO400M, patch_size=14, image_size=384),
        *(48, (3, 384, 384), 17.0, 25.9),
    ),
    "transformers-dinov2-l-518": Host(
        transformers_model(
            "Dinov2Model",
            "Dinov2Config",
            **{name: value for name, value in LARGE.items() if name != "intermediate_size"},
            **{"image_size": 518, "patch_size": 14},
        ),
        *(32, (3, 518, 518), 34.3, 53.3),
    ),
    "transformers-videomae-b-16x224": Host(
        transformers_model("VideoMAEForVideoClassification", "VideoMAEConfig"), 16, (16, 3, 224, 224), 76.1, 119.2
    ),
    "timm-dinov3-b-256": Host(timm_model("vit_base_patch16_dinov3"), 256, (3, 256, 256), 13.9, 21.0),
    "timm-dinov3-l-512": Host(timm_model("vit_large_patch16_dinov3", img_size=512), 32, (3, 512, 512), 26.3, 40.5),
    "timm-eva02-l-448": Host(timm_model("eva02_large_patch14_448"), 32, (3, 448, 448), 26.2, 40.4),
    "timm-pe-l-336": Host(timm_model("vit_pe_core_large_patch14_336"), 64, (3, 336, 336), 15.2, 23.2),
    "timm-beit-b-224": Host(timm_model("beit_base_patch16_224"), 256, (3, 224, 224), 10.5, 15.9),
    "timm-vit-b16-224": Host(timm_model("vit_base_patch16_224"), 256, (3, 224, 224), 10.5, 15.9),
    "torchvision-vit-b16-224": Host(torchvision_model("vit_b_16"), 256, (3, 224, 224), 10.5, 15.9),
    "open_clip-vit-l14-224": Host(open_clip_tower("ViT-L-14"), 128, (3, 224, 224), 6.9, 10.5),
}


def main() -> None:
    """Measure what was asked for, in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="hosts whose name contains one of these, divided by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled model out")
    parser.add_argument("--runs", type=int, default=11)
    options = parser.parse_args()
    device = measure.checked_device(options.device)
    for name, host in HOSTS.items():
        if not any(part in name for part in options.only.split(",")):
            continue
        start = time.perf_counter()
        result = measured(host, device, options.runs, not options.no_compile)
        (options.out / f"hosts-{name}.json").write_text(json.dumps({"name": name, **result}, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", json.dumps(result["images_per_second"]), flush=True)
        torch.cuda.empty_cache()
        torch._dynamo.reset()


def measured(host: Host, device: torch.device, runs: int, compiles: bool) -> dict[str, Any]:
    """Images per second of the model unpatched and patched, in batches and one by one, and what r saves."""
    with device:
        model: Any = host.make().to(device).eval().half().requires_grad_(False)
    images = torch.randn(host.batch, *host.size, device=device, dtype=torch.float16)
    calls: dict[str, measure.Call] = {"eager": _call(model, images)}
    if compiles:
        calls["compiled"] = _call(torch.compile(model), images)
    times = _medians(calls, device, runs)
    small = _medians({"eager": _call(model, images[:1])}, device, 4 * runs)
    tome.patch.auto(model)
    flops = {"eager": cost.flops(model, 0, host.size)}
    for name, mean in (("1.5x", host.low), ("2.0x", host.high)):
        model.r = spread(mean, len(model._tome_info["r"]))
        flops[name] = cost.flops(model, model.r, host.size)
        times |= _medians({name: _call(model, images)}, device, runs)
        small |= _medians({name: _call(model, images[:1])}, device, 4 * runs)
    parts = tome.report.parts(model, images[:1])
    tome.unpatch(model)
    times |= _medians({"eager, again": _call(model, images)}, device, runs)
    small |= _medians({"eager, again": _call(model, images[:1])}, device, 4 * runs)
    return {
        "batch": host.batch,
        "saved": {name: flops["eager"] / each for name, each in flops.items()},
        "images_per_second": {name: host.batch / seconds for name, seconds in times.items()},
        "batch_1_ms": {name: 1e3 * seconds for name, seconds in small.items()},
        "a_block": [str(call) for part in parts[2:3] for call in part.calls],
        "conditions": measure.machine(device),
    }


def spread(mean: float, depth: int) -> list[int]:
    """A schedule that merges ``mean`` tokens a layer on average, each layer as many as the next or one more."""
    merged = [int(mean * layer + 1e-6) for layer in range(depth + 1)]
    return [after - before for before, after in pairwise(merged)]


def _call(model: nn.Module, images: Tensor) -> measure.Call:
    return lambda: model(images)


def _medians(calls: dict[str, measure.Call], device: torch.device, runs: int) -> dict[str, float]:
    seconds = measure.time_calls(calls, device, warm_up=3, runs=runs, progress=False)
    return {name: statistics.median(each) for name, each in seconds.items()}


if __name__ == "__main__":
    main()
