"""Write the README's GPU tables, and the plot of throughput against r, from the stored figures.

python benchmarks/tables.py          # write
python benchmarks/tables.py --check  # exit 1 where the README does not say what the figures say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from headline import BASE, MODELS, RESULTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "images" / "throughput_h200.png"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(*head: str) -> list[str]:
    return [row(*head), row(*("---" for _ in head))]


def speed(result: dict[str, Any]) -> str:
    return f"{result['speedup']:.2f}x"


def conditions(data: dict[str, Any]) -> str:
    said = data["conditions"]
    return (
        f"{said['gpu']}, driver {said['driver']}, Python {said['python']}, torch {said['torch']}, timm {said['timm']}"
    )


def headline() -> list[str]:
    """vit_base, batch 256: float16, autocast and compiled, each against its own unpatched model."""
    half, autocast, compiled = (load(f"h200-base{part}") for part in ("", "-autocast", "-compiled"))
    modes = [
        (half["results"], "eager"),
        (autocast["results"], "eager"),
        (compiled["results"], "compiled"),
    ]
    lines = table("r", "tokens left", "saved arithmetic allows", "float16", "images/s", "autocast", "both compiled")
    for result in half["results"]:
        same = [
            next(each for each in results if (each["r"], each["mode"]) == (result["r"], mode))
            for results, mode in modes
        ]
        lines.append(
            row(
                "unpatched" if result["r"] == "none" else result["r"],
                result["tokens"][-1],
                f"{result['allowed']:.2f}x",
                speed(result),
                f"{result['images_per_second']:,.0f}".replace(",", " "),
                *(speed(each) for each in same[1:]),
            )
        )
    seconds = [each["first_call_s"] for each in compiled["results"] if each["mode"] == "compiled"]
    return [
        *lines,
        "",
        f"{BASE}, batch 256; {conditions(half)}. Compiling took {seconds[0]:.0f} s unpatched and "
        f"{min(seconds[1:]):.0f} to {max(seconds[1:]):.0f} s patched.",
    ]


def batches() -> list[str]:
    """vit_base in small batches."""
    lines = table("batch", "eager, r = 8", "eager, r = 16", "CUDA graph, r = 8", "CUDA graph, r = 16")
    for batch in (1, 8, 32, 64):
        found = [load(f"h200-base-batch{batch}{suffix}")["results"] for suffix in ("", "-graph")]
        lines.append(row(batch, *(speed(each) for results in found for each in results if each["r"] != "none")))
    return lines


def models() -> list[str]:
    """Other models, float16, eager."""
    lines = table("model", "batch", "unpatched, images/s", "r: speed-up (saved arithmetic allows)")
    for model, (batch, _, _) in MODELS.items():
        base, *merged = load(f"h200-{model}")["results"]
        lines.append(
            row(
                *(model, batch, f"{base['images_per_second']:,.0f}".replace(",", " ")),
                "; ".join(f"{each['r']}: {speed(each)} ({each['allowed']:.2f}x)" for each in merged),
            )
        )
    return lines


TABLES = {"headline": headline, "batches": batches, "models": models}


def rendered(text: str) -> str:
    """The text with every table between its markers made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: benchmarks/tables.py -->", f"<!-- end of {name} -->"
        if begin not in text:
            raise SystemExit(f"the README lacks the marker {begin}")
        lines = "\n".join(make())
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, b=begin, e=end, t=lines: f"{b}\n{t}\n{e}",
                      text, flags=re.DOTALL)  # fmt: skip
    return text


def draw() -> None:
    """Throughput against r: unpatched, reference, cuda."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = load("h200-base-sweep")
    base, *merged = data["results"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(base["images_per_second"], color="0.5", linestyle="--", label="unpatched, fused attention")
    for name, colour in (("cuda", "tab:green"), ("reference", "tab:blue")):
        points = [(int(each["r"]), each["images_per_second"]) for each in merged if each["backend"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
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
    figure.savefig(PLOT, dpi=130)


def main() -> int:
    """Write or check."""
    text = README.read_text()
    new = rendered(text)
    if "--check" in sys.argv:
        return int(new != text)
    README.write_text(new)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
