"""Where does a merged token stand? Merge tokens of Vision Transformers whose attention uses positions in every block.

    python benchmarks/positions.py --model rope --seed 0 --device cuda:0 --out positions  (or --model bias)
    python benchmarks/positions.py --report positions

The first trains a small Vision Transformer, merges its tokens without retraining, and writes one JSON file; the second
prints tables over the seeds. ``rope`` has 2-D axial rotary embeddings on the patches (as timm's EVA), ``bias`` a
relative position bias in every block (as BEiT); neither has another position embedding. Every image holds three
handwritten digits of scikit-learn; its label is the class of the one that stands highest.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tome_reference

CLASSES, DIGITS = 10, 3
TRAIN = 1297  # of the 1797 digits; the rest is for testing
SAVINGS = (1.35, 1.5, 2.0, 2.5)  # the arithmetic of the unmerged model over that of the merged one
INDICES = ("first", "last", "target", "largest")
CHOICES: dict[str, list[tuple[str, str]]] = {  # (place of a merged token, keys matched before or after the rotation)
    "rope": [(p, k) for k in ("before", "after") for p in (*INDICES, "mean", "circular", "coordinates")],
    "bias": [(p, "before") for p in (*INDICES, "mean")],
}
METRICS = {"accuracy": (100, 1, max), "agreement": (100, 1, max), "kl": (1, 4, min), "cosine": (1, 4, max)}
OPTIONS = {  # dense: the weight of the training loss on the patches; test: how many images
    "seed": 0, "device": "cuda:0", "out": Path("positions"), "steps": 4000, "batch": 256, "lr": 1e-3, "dense": 1.0,
    "test": 5120, "canvas": 64, "patch": 4, "width": 192, "depth": 8, "heads": 6,
}  # fmt: skip
CHUNK = 32  # batches of training images that are drawn at once


class Scenes:
    """Endless images [B, 1, S, S] with the label of each and, for each patch, the class of the digit on it."""

    def __init__(self, digits: Tensor, labels: Tensor, canvas: int, patch: int, seed: int) -> None:
        self.digits, self.labels, self.canvas, self.patch = digits, labels, canvas, patch
        self.generator = torch.Generator(digits.device).manual_seed(seed)
        self.y, self.x = (torch.ones(canvas, canvas, device=digits.device).cumsum(dim=d) - 0.5 for d in (0, 1))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=self.digits.device, generator=self.generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        unit = self.canvas / 64
        index = self.uniform(count, DIGITS, high=len(self.digits)).long().clamp_(max=len(self.digits) - 1)
        side = 8 * unit * self.uniform(count, DIGITS, low=1.5, high=2.5)
        # Centers (y, x), the first of 64 draws in which no boxes overlap and all heights differ.
        edge = side[:, None, :, None] / 2
        centers = edge + self.uniform(count, 64, DIGITS, 2) * (self.canvas - 2 * edge)
        i, j = [0, 0, 1], [1, 2, 2]
        apart = (centers[:, :, i] - centers[:, :, j]).abs()
        is_good = (apart.amax(dim=-1) >= (side[:, i] + side[:, j])[:, None] / 2) & (apart[..., 0] >= 2 * unit)
        centers = centers[torch.arange(count, device=side.device), is_good.all(dim=2).int().argmax(dim=1)]
        # From canvas to digit: shift, turn by up to 15 degrees, and scale to [-1, 1].
        angle = self.uniform(count, DIGITS, low=-0.26, high=0.26)[..., None, None]
        dy, dx = self.y - centers[..., 0, None, None], self.x - centers[..., 1, None, None]
        turned = torch.stack([dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()], dim=-1)
        grid = (turned / (side / 2)[..., None, None, None]).flatten(0, 1)
        ink = F.grid_sample(self.digits[index].flatten(0, 1)[:, None], grid, align_corners=False)
        ink = ink.view(count, DIGITS, *self.y.shape) * self.uniform(count, DIGITS, 1, 1, low=0.7)
        image = torch.maximum(self._background(count, unit), ink.amax(dim=1))
        image = image + 0.05 * torch.randn(image.shape, device=image.device, generator=self.generator)
        classes = self.labels[index]
        label = classes.gather(1, centers[..., 0].argmin(dim=1, keepdim=True))[:, 0]
        amount, which = F.avg_pool2d(ink, self.patch).max(dim=1)
        seen = classes.gather(1, which.flatten(1)).masked_fill_(amount.flatten(1) < 0.1, CLASSES)
        return image[:, None] - 0.3, label, seen

    def _background(self, count: int, unit: float) -> Tensor:
        """A smooth gradient and distractor strokes."""
        image = F.interpolate(self.uniform(count, 1, 4, 4, high=0.4), self.y.shape, mode="bilinear")[:, 0]
        for _ in range(4):
            y, x = self.uniform(2, count, 1, 1, high=self.canvas)
            down, right = self.uniform(2, count, 1, 1, low=-12 * unit, high=12 * unit)
            along = (((self.y - y) * down + (self.x - x) * right) / (down**2 + right**2 + 1e-6)).clamp_(0, 1)
            distance = (self.y - y - along * down) ** 2 + (self.x - x - along * right) ** 2
            ink = (-distance / (2 * unit * unit)).exp()
            image = torch.maximum(image, ink * self.uniform(count, 1, 1, low=0.3, high=0.8))
        return image


class Places:
    """The original members of every token, and the token's place, followed through the merges of a batch."""

    def __init__(self, rule: str, batch: int, tokens: int, device: torch.device) -> None:
        self.rule = rule
        self.total = torch.arange(tokens, device=device).expand(batch, -1)  # token of every original one
        self.index = self.total  # the original token at whose place each token stands, for the rules of INDICES

    def merge(self, slot: Tensor, tokens: int, size: Tensor | None) -> None:
        """Follow one merge; ``size`` is that of its input tokens."""
        step, (batch, n) = slot.long(), slot.shape
        self.total = step.gather(1, self.total)
        empty = self.index.new_zeros(batch, tokens)
        if self.rule in ("first", "last"):
            reduce = {"first": "amin", "last": "amax"}[self.rule]
            self.index = empty.scatter_reduce(1, step, self.index, reduce, include_self=False)
        elif self.rule == "target":  # set B is at the odd positions, and no group holds two of it
            even = empty.scatter(1, step[:, ::2], self.index[:, ::2])
            self.index = even.scatter(1, step[:, 1::2], self.index[:, 1::2])
        elif self.rule == "largest":
            size = torch.ones(slot.shape, device=slot.device) if size is None else size
            backwards = torch.arange(n - 1, -1, -1, device=slot.device)  # so that the lowest index wins a tie
            best = empty.scatter_reduce(1, step, size.long() * n + backwards, "amax", include_self=False)
            self.index = self.index.gather(1, n - 1 - best % n)

    def average(self) -> Tensor:
        """P [B, M, N]: the mean over the original members of each token, which weighs tokens by their sizes."""
        members = F.one_hot(self.total).transpose(1, 2).float()
        return members / members.sum(dim=2, keepdim=True)

    def tables(self, cos: Tensor, sin: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of every token, [B, 1, M, D], from the tables [N, D] and coordinates [N - 1, 2]."""
        if self.rule in INDICES:
            cos, sin = cos[self.index], sin[self.index]
        elif self.rule == "coordinates":
            cos, sin = axial(self.average()[:, 1:, 1:] @ coordinates, cos.shape[1])
        else:
            cos, sin = self.average() @ cos, self.average() @ sin
        if self.rule == "circular":
            length = torch.hypot(cos, sin).clamp(min=1e-6)
            cos, sin = cos / length, sin / length
        return cos[:, None], sin[:, None]

    def bias(self, bias: Tensor) -> Tensor:
        """The bias [H, N, N] between every two tokens, [B, H, M, M]."""
        if self.rule == "mean":
            return self.average()[:, None] @ bias @ self.average()[:, None].transpose(2, 3)
        return bias[:, self.index[:, :, None], self.index[:, None, :]].transpose(0, 1)


def axial(coordinates: Tensor, dim: int, temperature: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cos and sin [..., N, dim] of patches at ``coordinates`` [..., N - 1, 2], behind a class token that stays."""
    bands = temperature ** (-torch.arange(dim // 4, device=coordinates.device) / (dim // 4))
    angles = (coordinates[..., None] * bands).flatten(-2).repeat_interleave(2, dim=-1)
    angles = F.pad(angles, (0, 0, 1, 0))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Vit(nn.Module):
    def __init__(self, kind: str, canvas: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        side, self.heads, self.is_rope = canvas // patch, heads, kind == "rope"
        self.tokens = side**2 + 1
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        coordinates = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        cos, sin = axial(coordinates.float(), width // heads)
        # As BEiT: a row for every offset of two patches, three for class to patch, patch to class, class to class.
        span, offsets = 2 * side - 1, (2 * side - 1) ** 2
        row, column = (coordinates[:, None] - coordinates + side - 1).unbind(2)
        relative = F.pad(row * span + column, (1, 0, 1, 0))
        relative[0, :], relative[:, 0], relative[0, 0] = offsets, offsets + 1, offsets + 2
        for name, buffer in (("coordinates", coordinates.float()), ("cos", cos), ("sin", sin), ("relative", relative)):
            self.register_buffer(name, buffer)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            layers = {"norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
            mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.blocks.append(nn.ModuleDict({**layers, "norm2": nn.LayerNorm(width), "mlp": mlp}))
        self.bias = None if self.is_rope else nn.Parameter(torch.zeros(depth, heads, offsets + 3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.dense = nn.Linear(width, CLASSES + 1)  # for training alone

    def forward(self, images: Tensor, r: int = 0, rule: str = "first", keys: str = "before") -> tuple[Tensor, Tensor]:
        """Logits [B, CLASSES] and all tokens [B, M, C] behind the last norm."""
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        places, size = Places(rule, len(x), self.tokens, x.device), None
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(block.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            metric, mask = k, None
            if self.is_rope:
                tables = self.cos, self.sin
                tables = tables if size is None else places.tables(*tables, self.coordinates)
                q, k = rotate(q, *tables), rotate(k, *tables)
                metric = k if keys == "after" else metric
            else:
                mask = self.bias[i][:, self.relative]
                mask = (mask[None] if size is None else places.bias(mask)).to(q.dtype)
            if size is not None:
                mask = size.log()[:, None, None, :] + (0 if mask is None else mask)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.proj(y.transpose(1, 2).flatten(2))
            if r > 0:
                slot = tome_reference.match(metric, r, prefix=1)
                left = x.shape[1] - min(r, tome_reference.max_r(x.shape[1], 1))
                places.merge(slot, left, size)
                x, size = tome_reference.merge(x, slot, left, size)
            x = x + block.mlp(block.norm2(x))
        x = self.norm(x)
        return self.head(x[:, 0]), x


def flops(n: int, depth: int, width: int, r: int) -> int:
    """Multiplications of ``depth`` blocks, each of which merges ``r`` tokens behind its attention."""
    left = n - min(r, tome_reference.max_r(n, 1))
    block = 4 * n * width**2 + 2 * n**2 * width + 8 * left * width**2
    return block + (flops(left, depth - 1, width, r) if depth > 1 else 0)


def train(model: Vit, scenes: Scenes, args: argparse.Namespace) -> None:
    device, is_cuda = scenes.digits.device, scenes.digits.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=is_cuda)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05, cycle_momentum=False)
    weight = torch.tensor([1.0] * CLASSES + [0.1], device=device)  # most patches have no digit
    for step in range(args.steps):
        if step % CHUNK == 0:
            images, labels, seen = scenes.draw(CHUNK * args.batch)
        at = slice(step % CHUNK * args.batch, (step % CHUNK + 1) * args.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda):
            logits, tokens = model(images[at])
            patches = model.dense(tokens[:, 1:])
        loss = F.cross_entropy(logits.float(), labels[at])
        # Naming the digit on every patch besides shortens the plateau before the class token finds the digits.
        dense = F.cross_entropy(patches.float().flatten(0, 1), seen[at].flatten(), weight)
        optimizer.zero_grad()
        (loss + args.dense * dense).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % max(1, args.steps // 20) == 0:
            hits = (logits.argmax(dim=1) == labels[at]).float().mean()
            print(f"{args.model} {args.seed} step {step} loss {loss:.3f} {dense:.3f} top-1 {hits:.3f}", flush=True)


@torch.inference_mode()
def evaluate(model: Vit, scenes: Scenes, args: argparse.Namespace) -> dict[str, Any]:
    """Every choice with every schedule, in float32."""
    costs = [flops(model.tokens, args.depth, args.width, r) for r in range(model.tokens // 2)]
    saved = [costs[0] / cost for cost in costs]
    rs = {s: min(range(len(saved)), key=lambda r, s=s: abs(saved[r] - s)) for s in SAVINGS}
    runs = [(*choice, s) for choice in CHOICES[args.model] for s in SAVINGS]
    results = [{"place": p, "keys": k, "schedule": s} | dict.fromkeys(METRICS, 0.0) for p, k, s in runs]
    correct = 0.0
    for first in range(0, args.test, args.batch):
        images, labels, _ = scenes.draw(min(args.batch, args.test - first))
        logits, tokens = model(images)
        top, log_p = logits.argmax(dim=1), logits.log_softmax(dim=1)
        correct += (top == labels).sum().item() / args.test
        for row in results:
            merged, left = model(images, rs[row["schedule"]], row["place"], row["keys"])
            kl = (log_p.exp() * (log_p - merged.log_softmax(dim=1))).sum(dim=1)
            guess, cosine = merged.argmax(dim=1), F.cosine_similarity(left[:, 0], tokens[:, 0])
            for name, value in zip(METRICS, (guess == labels, guess == top, kl, cosine), strict=True):
                row[name] += value.double().sum().item() / args.test
    schedules = [{"schedule": s, "r": r, "saving": saved[r]} for s, r in rs.items()]
    return {"accuracy": correct, "schedules": schedules, "results": results}


def report(folder: Path) -> None:
    """Tables over the seeds: the mean (lowest-highest) of each metric, the best means of a column in bold."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for kind in sorted({file["model"] for file in files}):
        seeds = [file for file in files if file["model"] == kind]
        heads = [f"{s['saving']:.2f}x (r = {s['r']})" for s in seeds[0]["schedules"]]
        found: dict[Any, list[float]] = {}
        for row in (row for file in seeds for row in file["results"]):
            for name, (scale, _, _) in METRICS.items():
                found.setdefault((row["place"], row["keys"], row["schedule"], name), []).append(scale * row[name])
        unmerged = cell([100 * file["accuracy"] for file in seeds], 1)
        print(f"\n## {kind}: unmerged top-1 {unmerged} %, {len(seeds)} seeds, {seeds[0]['test']} test images each")
        for names in (("accuracy", "agreement", "kl"), ("cosine",)):
            print(f"\nCells: {' / '.join(names)}.\n\n| place | keys | {' | '.join(heads)} |")
            print("|---|---|" + "---|" * len(heads))
            for choice in CHOICES[kind]:
                cells = [" / ".join(marked(found, kind, choice, s, name) for name in names) for s in SAVINGS]
                print(f"| {' | '.join((*choice, *cells))} |")


def marked(found: dict[Any, list[float]], kind: str, choice: tuple[str, str], saving: float, name: str) -> str:
    _, digits, best = METRICS[name]
    means = {c: round(sum(found[(*c, saving, name)]) / len(found[(*c, saving, name)]), digits) for c in CHOICES[kind]}
    mark = "**" if means[choice] == best(means.values()) else ""
    return mark + cell(found[(*choice, saving, name)], digits) + mark


def cell(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--report", type=Path, metavar="DIR", help="print the tables of DIR and do nothing else")
    parser.add_argument("--model", choices=CHOICES, default="rope")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.report:
        report(args.report)
        return
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # not sure to take a mask that wants a gradient
    images, classes = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))  # one split for all seeds
    digits, labels = images[order].float().view(-1, 8, 8).to(args.device) / 16, classes[order].to(args.device)
    shown = Scenes(digits[:TRAIN], labels[:TRAIN], args.canvas, args.patch, 1000 + args.seed)
    held = Scenes(digits[TRAIN:], labels[TRAIN:], args.canvas, args.patch, 1)  # the same test images for all seeds
    model = Vit(args.model, args.canvas, args.patch, args.width, args.depth, args.heads).to(args.device)
    times = [time.perf_counter()]
    train(model, shown, args)
    times.append(time.perf_counter())
    found = evaluate(model, held, args)
    seconds = {"train": round(times[1] - times[0], 1), "evaluate": round(time.perf_counter() - times[1], 1)}
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "report")}
    text = json.dumps(settings | {"seconds": seconds} | found, indent=1)
    (args.out / f"{args.model}_{args.seed}.json").write_text(text + "\n")
    print(f"{args.model} {args.seed} unmerged top-1 {found['accuracy']:.3f}, seconds {seconds}")


if __name__ == "__main__":
    main()
