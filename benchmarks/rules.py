"""Which tokens go, and what becomes of them: rules beside bipartite matching, on DINOv2 ViT-S/14 or a ViT of yours.

    python benchmarks/rules.py [--device cpu] [--images 48] [--seeds 3] [--checkpoint FILE --data FOLDER] [--json FILE]

Written from the papers: merging (arXiv 2210.09461), an energy that says which tokens may merge (PiToMe, 2405.16148),
pruning by the class token's attention beside merging (DiffRate, 2305.17997), and a size that counts a merged token by
its similarity. The error is the mean of 1 - cosine of the class token to the unmerged model's, at equal counts of
tokens; the time is that of these lines of PyTorch, all rules in turns. FILE holds weights of vit_small_patch16_224.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dinov2
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tome import measure

SCHEDULES = {
    "constant": [12] * 12,
    "late": [0, 0, 0, 0, 26, 26, 26, 26, 26, 26, 26, 26],
    "constant, strong": [18] * 12,
    "falling, strong": [25, 23, 21, 19, 17, 15, 14, 12, 10, 8, 6, 5],
}
ALPHA = 1.0


def ranked(metric: Tensor, r: int, source: Tensor, target: Tensor, sim: Tensor) -> tuple[Tensor, Tensor]:
    """The r best of ``source`` [B, S], each into its best of ``target`` [B, T]: their indices, both [B, r]."""
    best, where = sim.max(dim=2)
    order = best.argsort(dim=1, descending=True)[:, :r]
    return source.gather(1, order), target.gather(1, where.gather(1, order))


def reduced(
    x: Tensor, size: Tensor, origin: Tensor, into: Tensor, weight: Tensor, in_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens ``origin`` [B, r] leave; with that weight [B, r] they join the tokens ``into``, 0 drops them.

    Those at even places come first, as in the paper, unless ``in_order``.
    """
    total = size.scatter_add(1, into, size.gather(1, origin) * weight)
    share = (size.gather(1, origin) * weight)[..., None]
    moved = x.gather(1, origin[..., None].expand(-1, -1, x.shape[2])) * share
    mean = (x * size[..., None]).scatter_add(1, into[..., None].expand_as(moved), moved) / total[..., None]
    keep = torch.ones_like(size, dtype=torch.bool).scatter(1, origin, False)
    b, c = x.shape[0], x.shape[2]
    if not in_order:
        n = x.shape[1]
        order = torch.cat([torch.arange(1), torch.arange(2, n, 2), torch.arange(1, n, 2)]).to(x.device)
        mean, total, keep = mean[:, order], total[:, order], keep[:, order]
    return mean[keep].view(b, -1, c), total[keep].view(b, -1)


def bipartite(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ToMe does it: every second token into its best of the others; class token left out. Also their cosines."""
    n = metric.shape[1]
    even = torch.arange(2, n, 2, device=metric.device).expand(metric.shape[0], -1)
    odd = torch.arange(1, n, 2, device=metric.device).expand(metric.shape[0], -1)
    sim = metric[:, 2::2] @ metric[:, 1::2].mT
    origin, into = ranked(metric, r, even, odd, sim)
    cosine = (_rows(metric, origin) * _rows(metric, into)).sum(dim=2)
    return origin, into, cosine


def by_energy(metric: Tensor, r: int, depth: float) -> tuple[Tensor, Tensor]:
    """As PiToMe does it: the 2 r tokens of most energy, taken in turns as sources and targets."""
    margin = 0.9 - 0.9 * depth
    sim = metric[:, 1:] @ metric[:, 1:].mT
    energy = torch.where(sim >= margin, sim, ALPHA * (torch.exp(sim - margin) - 1)).mean(dim=2)
    order = 1 + energy.argsort(dim=1, descending=True)[:, : 2 * r]
    source, target = order[:, ::2], order[:, 1::2]
    where = (_rows(metric, source) @ _rows(metric, target).mT).argmax(dim=2)
    return source, target.gather(1, where)


def step(rule: str, x: Tensor, size: Tensor, keys: Tensor, attention: Tensor, r: int, depth: float) -> Any:
    """X [B, N, C] and sizes [B, N] with r tokens less."""
    metric = F.normalize(keys.mean(dim=1), dim=-1)
    r = min(r, (x.shape[1] - 1) // 2)
    if rule == "energy":
        origin, into = by_energy(metric, r, depth)
        return reduced(x, size, origin, into, torch.ones_like(origin, dtype=x.dtype))
    dropped = round(r * float(rule.removeprefix("prune "))) if rule.startswith("prune") else 0
    if dropped:
        least = attention[:, :, 0, 1:].mean(dim=1).argsort(dim=1)[:, :dropped] + 1
        keep = torch.ones_like(size, dtype=torch.bool).scatter(1, least, False)
        x, size, metric = (part[keep].view(x.shape[0], -1, *part.shape[2:]) for part in (x, size, metric))
    if r == dropped:
        return x, size
    origin, into, cosine = bipartite(metric, r - dropped)
    weight = cosine.clamp(0, 1) if rule == "similar size" else torch.ones_like(cosine)
    return reduced(x, size, origin, into, weight, rule == "in order")


def features(model: Any, images: Tensor, r: list[int], rule: str) -> Tensor:
    """The class token behind the last norm."""
    x = model._pos_embed(model.patch_embed(images))
    size = torch.ones(x.shape[:2], device=x.device, dtype=x.dtype)
    for i, block in enumerate(model.blocks):
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.mT * attn.scale + size.log()[:, None, None]).softmax(dim=-1)
        x = x + block.ls1(attn.proj((weights @ v).transpose(1, 2).flatten(2)))
        if r[i]:
            x, size = step(rule, x, size, k, weights, r[i], i / len(model.blocks))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    out: Tensor = model.norm(x)[:, 0]
    return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


RULES = ("merge", "in order", "similar size", "energy", "prune 0.25", "prune 0.5", "prune 1.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="images for the model of --checkpoint")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    images: Callable[[int], Tensor]
    if options.checkpoint is None:
        model: Any = dinov2.model().to(device)
        images = partial(dinov2.crops, dinov2.CALIBRATION + dinov2.TEST, options.images)
    else:
        weights = torch.load(options.checkpoint, map_location=device)
        classes = len(weights["head.bias"])
        model = timm.create_model("vit_small_patch16_224", num_classes=classes).to(device).eval()
        model.load_state_dict(weights)
        images = partial(read, model, options.data, options.images)
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        for seed in range(options.seeds):
            x = images(seed=seed).to(device)
            base = [model.forward_features(batch)[:, 0] for batch in x.split(64)]
            for name, r in SCHEDULES.items():
                for rule in RULES:
                    made = [features(model, batch, r, rule) for batch in x.split(64)]
                    cosine = F.cosine_similarity(torch.cat(made).double(), torch.cat(base).double())
                    found.setdefault(f"{name}: {rule}", []).append(float((1 - cosine).mean()))
    calls = {
        f"{name}: {rule}": partial(features, model, x[:64], r, rule) for name, r in SCHEDULES.items() for rule in RULES
    }
    seconds = {name: statistics.median(times) for name, times in measure.time_calls(calls, device, 2, 9, False).items()}
    for name, errors in found.items():
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        print(f"{name:32} {statistics.mean(errors):.5f} +- {spread:.5f}", *(f"{e:.5f}" for e in errors), end=" ")
        print(f"{1e3 * seconds[name]:.3g} ms")
    if options.json is not None:
        conditions = {"images": options.images, "seeds": options.seeds, **measure.machine(device)}
        written = {"conditions": conditions, "errors": found, "seconds": seconds}
        options.json.write_text(json.dumps(written, indent=1) + "\n")


def read(model: Any, folder: Path, count: int, seed: int) -> Tensor:
    """So many images [B, 3, H, W], chosen by the seed."""
    files = sorted(folder.rglob("*.jpg"))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return torch.stack([transform(Image.open(files[i]).convert("RGB")) for i in chosen])


if __name__ == "__main__":
    main()
