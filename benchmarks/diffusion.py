"""What merging gains in a step of diffusers' UNets, and how much of the step the self-attention that it shortens takes.

    python benchmarks/diffusion.py [--only NAME] [--batch-size 8] [--ratio 0.5] [--cuda-graph | --compile] [--json FILE]

The UNets have the shapes of Stable Diffusion 1.5 and XL and random weights, so nothing is downloaded. Variants are
timed in turns, one call each, and medians compared; the baseline is the unpatched UNet with PyTorch's own attention.
What attention takes, matching and merging included, is the time of a variant less that of a UNet whose attentions of
that level give back what they get.

A step of eager modules may wait for the host: then what a GPU saves is not seen, nor is what attention takes.
``--cuda-graph`` leaves the host out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import tome
from tome.patch.diffusers_unet import MergingAttention

SD = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
XL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = SD | {
    "block_out_channels": (32, 32, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "layers_per_block": 1,
}
# name -> (configuration, pixels)
SHAPES = {
    "sd15-512": (SD, 512),
    "sd15-1024": (SD, 1024),
    "sdxl-1024": (XL, 1024),
    "sdxl-2048": (XL, 2048),
    "tiny-128": (TINY, 128),  # to try the script without a GPU
}
DEFAULT = ("sd15-512", "sd15-1024", "sdxl-1024")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SHAPES, help=f"shapes; default {', '.join(DEFAULT)}")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a call, both halves of guidance together")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--max-downsample", type=int, help="of the patched runs; default: the finest level alone")
    parser.add_argument("--runs", type=int, default=15, help="calls of each variant that are timed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compile", action="store_true", help="compile unpatched and patched UNet alike")
    how.add_argument("--cuda-graph", action="store_true", help="capture unpatched and patched UNet alike")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{where(options.device)}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{'shape':>10} {'variant':>22} {'ms a step':>10} {'gain':>6} {'attention':>10} {'its share':>10}")
    results = []
    for name in options.only or DEFAULT:
        rows = measured(name, options)
        results += rows
        for row in rows:
            print(
                f"{name:>10} {row['variant']:>22} {row['ms']:10.2f} {row['gain']:5.2f}x {row['attention_ms']:10.2f} "
                f"{100 * row['share']:9.1f}%",
                flush=True,
            )
    if options.json is not None:
        head = {
            "device": where(options.device), "torch": torch.__version__, "diffusers": diffusers.__version__,
            "batch_size": options.batch_size, "compiled": options.compile, "cuda_graph": options.cuda_graph,
        }  # fmt: skip
        options.json.write_text(json.dumps(head | {"rows": results}, indent=1) + "\n")


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


@torch.inference_mode()
def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    config, pixels = SHAPES[name]
    unet = make(config, options.device)
    given = inputs(unet, config, pixels // 8, options)
    tome.patch.diffusers(unet, options.ratio, options.max_downsample)
    shortened = [m for m in unet.modules() if isinstance(m, MergingAttention) and m._tome_level]

    def patch(**how: bool) -> Callable[[], object]:
        return lambda: tome.patch.diffusers(unpatched(unet, shortened), options.ratio, options.max_downsample, **how)

    def without() -> None:
        unpatched(unet, shortened)
        for module in shortened:
            module.forward = same

    variants: dict[str, Callable[[], object]] = {
        "unpatched": lambda: unpatched(unet, shortened),
        f"ratio {options.ratio}": patch(),
        f"ratio {options.ratio}, share_map": patch(share_map=True),
        "without attention": without,
    }
    times = {variant: [] for variant in variants}
    if options.compile or options.cuda_graph:
        calls = {}
        for variant, apply in variants.items():
            apply()
            calls[variant] = (compiled if options.compile else captured)(unet, given)
            if options.compile:  # what was compiled holds for this variant alone
                times[variant] = [timed(calls[variant], options.device) for _ in range(options.runs)]
                torch._dynamo.reset()
        if options.cuda_graph:
            for _ in range(options.runs):
                for variant, call in calls.items():
                    times[variant].append(timed(call, options.device))
    else:
        for run in range(-2, options.runs):
            for variant, apply in variants.items():
                apply()
                spent = timed(lambda: unet(**given), options.device)
                if run >= 0:
                    times[variant].append(spent)
    medians = {variant: statistics.median(each) for variant, each in times.items()}
    base, rest = medians["unpatched"], medians.pop("without attention")
    return [
        {
            "shape": name, "variant": variant, "ms": 1e3 * ms, "gain": base / ms, "attention_ms": 1e3 * (ms - rest),
            "share": (ms - rest) / ms, "runs": [1e3 * run for run in times[variant]],
        }
        for variant, ms in medians.items()
    ]  # fmt: skip


def unpatched(unet: nn.Module, shortened: list[nn.Module]) -> nn.Module:
    for module in shortened:
        vars(module).pop("forward", None)
    return tome.unpatch(unet)


def same(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states


def compiled(unet: nn.Module, given: dict[str, Any]) -> Callable[[], object]:
    function = torch.compile(unet)
    for _ in range(3):
        function(**given)
    return lambda: function(**given)


def captured(unet: nn.Module, given: dict[str, Any]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            unet(**given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unet(**given)
    return graph.replay


def make(config: dict[str, Any], device: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def inputs(
    unet: UNet2DConditionModel, config: dict[str, Any], side: int, options: argparse.Namespace
) -> dict[str, Any]:
    """A guidance batch: two halves of the same latents, with other texts."""
    batch, like = options.batch_size, {"device": options.device, "dtype": unet.dtype}
    latent = torch.randn(batch // 2, 4, side, side, **like)
    given: dict[str, Any] = {
        "sample": torch.cat([latent, latent]),
        "timestep": torch.tensor(500, device=options.device),
        "encoder_hidden_states": torch.randn(batch, 77, config["cross_attention_dim"], **like),
    }
    if "addition_embed_type" in config:
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, **like),
            "time_ids": torch.full((batch, 6), 1024.0, **like),
        }
    return given


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    ends[0].record()
    call()
    ends[1].record()
    torch.cuda.synchronize()
    return ends[0].elapsed_time(ends[1]) / 1e3


if __name__ == "__main__":
    main()
