"""The plots of docs/speed.md and docs/choosing-r.md, from the stored figures; benchmarks/tables.py calls it."""

from __future__ import annotations

import matplotlib
from tables import BASE, ROOT, Data, load

matplotlib.use("Agg")
from matplotlib import pyplot

IMAGES = ROOT / "docs" / "images"
BACKENDS = {"cuda": "kernels", "reference": "reference (PyTorch)"}


def draw() -> None:
    """All of them."""
    throughput()
    agreement()


def throughput() -> None:
    """Throughput against r: unpatched, reference, kernels."""
    data = load("h200-base-sweep")
    base, *merged = data["results"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(base["images_per_second"], color="0.5", linestyle="--", label="unpatched, fused attention")
    for name, colour in (("cuda", "tab:green"), ("reference", "tab:blue")):
        points = [(int(each["r"]), each["images_per_second"]) for each in merged if each["backend"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=BACKENDS[name])
    axes.plot(
        *zip(*{int(e["r"]): e["allowed"] * base["images_per_second"] for e in merged}.items(), strict=True),
        color="0.7", linestyle=":", label="what the saved arithmetic allows",
    )  # fmt: skip
    axes.set_xlabel("r, tokens merged in each layer")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.set_title(
        f"{BASE}, batch {data['conditions']['batch size']}, float16, {data['conditions']['gpu']}", fontsize=9
    )
    figure.savefig(IMAGES / "throughput_h200.png", dpi=130)
    pyplot.close(figure)


def agreement() -> None:
    """Agreement against speed-up: constant and falling schedules."""
    data = load("agreement-dinov2-cpu")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    base, *merged = (each for each in data["results"] if each["r"] != "0")
    kinds: dict[str, list[Data]] = {"the same r in each layer": [], "falling, (r, -1)": []}
    for each in merged:
        kinds["falling, (r, -1)" if each["r"].startswith("(") else "the same r in each layer"].append(each)
    for (label, found), (colour, up) in zip(kinds.items(), (("tab:blue", 8), ("tab:orange", -14)), strict=True):
        points = [(each["speedup"], each["cosine"]) for each in (base, *found)]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        for each in found:
            axes.annotate(
                f"r={each['r']}", (each["speedup"], each["cosine"]), xytext=(0, up), textcoords="offset points",
                fontsize=8, color=colour, ha="left" if up > 0 else "right",
            )  # fmt: skip
    axes.set_xlabel("speed-up")
    axes.set_ylabel("cosine with the unpatched model")
    axes.margins(x=0.12, y=0.14)
    axes.legend(loc="lower left")
    said = data["conditions"]
    axes.set_title(f"DINOv2 ViT-S/14, {said['data']}\n{said['cpu']}, {said['dtype']}", fontsize=8)
    figure.savefig(IMAGES / "agreement.png", dpi=130)
    pyplot.close(figure)
