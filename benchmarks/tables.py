"""Write the tables of the README and of the pages in docs, and their plots, from the stored figures.

python benchmarks/tables.py          # write
python benchmarks/tables.py --check  # exit 1 where a document does not say what the figures say

A table stands between ``<!-- NAME: benchmarks/tables.py -->`` and ``<!-- end of NAME -->``, and ends with what it was
measured on and how. All else in the documents is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from headline import BASE, MODELS, RESULTS, RUNS
from hosts import HOSTS

ROOT = Path(__file__).parents[1]
PAGES = ("speed", "measured", "install", "choosing-r", "merging", "training")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES))
BATCHES = (1, 8, 32, 64)
GRAPHS = "--torchcompile --torchcompile-mode reduce-overhead --workers 15"
RECIPE = "examples/finetune.py crops --model vit_base_patch16_224 --r 16 --amp --no-aug --sched-on-updates --epochs 2 "
RECIPE += f"--lr 2e-4 {GRAPHS} --batch-size 128 --seed 0"
FINETUNED = {  # rows of the table of processes, and what gives them
    "one": ("one, batch 128", f"python {RECIPE}"),
    "ddp": ("two, batch 128 each, DDP", f"torchrun --nproc-per-node 2 -- {RECIPE}"),
    "fsdp": ("two, batch 128 each, FSDP2", f"torchrun --nproc-per-node 2 -- {RECIPE} --fsdp"),
    "fsdp-resumed-on-one": (
        "that run, resumed on one, eager, two micro-batches",
        f"python {RECIPE.replace(GRAPHS, '--workers 6')} --grad-accum-steps 2 --resume last.pt",
    ),
    "one256-seed0": ("one, batch 256", f"python {RECIPE} --batch-size 256"),
    "one256-seed1": ("one, batch 256, another seed", f"python {RECIPE} --batch-size 256 --seed 1"),
}
COMMANDS = {  # of what headline.py does not run
    "cpu-vit_small": "tome bench vit_small_patch16_224 --r 8 --r 16 --r 16,-1.0 --runs 21",
    "h200-operations": 'pytest benchmarks -k "cuda and not kth and not random"',
    **{name: f"tome bench {arguments}" for name, arguments in RUNS.items()},
    "h200-training": "python benchmarks/training.py",
    "agreement-dinov2-cpu": "OMP_NUM_THREADS=1 python benchmarks/agreement.py --device cpu",
    "agreement-dinov2-cuda": "python benchmarks/agreement.py --device cuda --dtype float16 --batch-size 256 "
    "--crops 1024",
    **{f"finetune-vit_base-{name}-h200": command for name, (_, command) in FINETUNED.items()},
    **{f"hosts-{name}": f"python benchmarks/hosts.py --only {name}" for name in HOSTS},
}

Data = dict[str, Any]


def load(name: str) -> Data:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing. It is written by: {COMMANDS[name]}")
    data: Data = json.loads(file.read_text())
    return data


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(*head: str) -> list[str]:
    return [row(*head), row(*("---" for _ in head))]


def speed(result: Data | None) -> str:
    """The speed-up over the unpatched model; empty where it was not measured."""
    return "" if result is None else f"{result['speedup']:.2f}x"


def whole(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\N{NO-BREAK SPACE}")


def merging(result: Data | None) -> str:
    """What merging gives by itself: against r = 0 of the same path; empty where that was not measured."""
    ratio = None if result is None else result.get("merging")
    return "" if ratio is None else f"{ratio:.2f}x"


def rate(result: Data | None) -> str:
    return "" if result is None else whole(result["images_per_second"])


def allowed(result: Data) -> str:
    return f"{result['allowed']:.2f}x"


def schedule(result: Data) -> str:
    return "unpatched" if result["r"] == "none" else str(result["r"])


def find(data: Data, **wanted: object) -> Data | None:
    """The first result with these values."""
    same = (each for each in data["results"] if all(each.get(key) == value for key, value in wanted.items()))
    return next(same, None)


def schedules(data: Data) -> list[str]:
    """The values of r of merged models, each once, in their order."""
    return list(dict.fromkeys(each["r"] for each in data["results"] if each["r"] != "none"))


def machine(data: Data) -> str:
    said = data["conditions"]
    where = f"{said['gpu']}, driver {said['driver']}" if "gpu" in said else said["cpu"]
    return f"{where}, Python {said['python']}, torch {said['torch']}, timm {said['timm']}"


def measured(what: str, runs: dict[str, Data], script: str = "headline") -> list[str]:
    """What a table was measured on, and by which command; of several runs, the first command and what runs them all."""
    machines = "; ".join(dict.fromkeys(map(machine, runs.values())))
    command = f"`{' '.join(COMMANDS[next(iter(runs))].split())}`"
    if len(runs) > 1:
        command += f" and {len(runs) - 1} more like it, all by `python benchmarks/{script}.py`"
    return ["", f"{what}; {machines}; {command}."]


def cpu() -> list[str]:
    """vit_small on a CPU."""
    name = "cpu-vit_small"
    data = load(name)
    lines = table(
        *("r", "tokens left", "GFLOPs", "images/s", "speed-up", "the saved arithmetic allows", "share of that")
    )
    for each in data["results"]:
        share = "" if each["r"] == "none" else f"{each['share']:.2f}"
        gflops, images = f"{each['gflops']:.2f}", f"{each['images_per_second']:.1f}"
        lines.append(row(schedule(each), each["tokens"][-1], gflops, images, speed(each), allowed(each), share))
    said = data["conditions"]
    return [*lines, *measured(f"{said['model']}, batch {said['batch size']}, {said['dtype']}", {name: data})]


def headline() -> list[str]:
    """vit_base, batch 256: float16, autocast and compiled, each against its own unpatched model."""
    runs = {name: load(name) for name in ("h200-base", "h200-base-autocast", "h200-base-compiled")}
    half, autocast, compiled = runs.values()
    lines = table(
        *("r", "tokens left", "saved arithmetic allows", "float16", "images/s", "by merging alone", "autocast"),
        "both compiled",
    )
    for each in half["results"]:
        others = find(autocast, r=each["r"]), find(compiled, r=each["r"], mode="compiled")
        lines.append(
            row(
                *(schedule(each), each["tokens"][-1], allowed(each), speed(each), rate(each), merging(each)),
                *map(speed, others),
            )
        )
    seconds = [each["first_call_s"] for each in compiled["results"] if each["mode"] == "compiled"]
    lines += measured(f"{BASE}, batch {half['conditions']['batch size']}", runs)
    if len(seconds) > 1:
        patched = f"{min(seconds[1:]):.0f} to {max(seconds[1:]):.0f} s patched"
        lines[-1] += f" Compiling took {seconds[0]:.0f} s unpatched and {patched}."
    return lines


def batches() -> list[str]:
    """vit_base in small batches."""
    modes = {"": "eager", "-graph": "CUDA graph"}
    rows = {(batch, mode): f"h200-base-batch{batch}{suffix}" for batch in BATCHES for suffix, mode in modes.items()}
    runs = {name: load(name) for name in rows.values()}
    values = schedules(next(iter(runs.values())))
    lines = table("batch", "mode", *(f"r = {r}" for r in values))
    lines += [row(*head, *(speed(find(runs[name], r=r)) for r in values)) for head, name in rows.items()]
    return [*lines, *measured(f"{BASE}, float16", runs)]


def models() -> list[str]:
    """Other models, float16, eager."""
    runs = {f"h200-{model}": load(f"h200-{model}") for model in MODELS}
    lines = table("model", "batch", "unpatched, images/s", "r: speed-up (saved arithmetic allows)")
    for model, data in zip(MODELS, runs.values(), strict=True):
        base, *merged = data["results"]
        ratios = "; ".join(f"{each['r']}: {speed(each)} ({allowed(each)})" for each in merged)
        lines.append(row(model, data["conditions"]["batch size"], rate(base), ratios))
    return [*lines, *measured("float16, eager", runs)]


def training() -> list[str]:
    """vit_base forward and backward: eager, compiled, and whole steps, each against its own unpatched model."""
    name = "h200-training"
    data = load(name)
    lines = table(
        *("r", "saved arithmetic allows", "eager", "images/s", "GiB", "a whole step", "compiled", "images/s", "GiB"),
        *("compiled, CUDA graphs", "images/s"),
    )
    for each in data["results"]:
        if each["mode"] == "eager":
            step, compiled, graphs = (find(data, r=each["r"], mode=mode) for mode in ("step", "compiled", "graphs"))
            memory = ("" if result is None else f"{result['peak_gib']:.1f}" for result in (each, compiled))
            lines.append(
                row(
                    *(schedule(each), allowed(each), speed(each), rate(each), next(memory), speed(step)),
                    *(speed(compiled), rate(compiled), next(memory), speed(graphs), rate(graphs)),
                )
            )
    said = data["conditions"]
    return [*lines, *measured(f"{said['model']}, batch {said['batch size']}, {said['dtype']}", {name: data})]


def processes() -> list[str]:
    """vit_base trained on one GPU and on two, and the losses of the same updates on one."""
    lines = table(
        *("GPUs", "images/s of the second epoch", "after its first batch", "GiB a GPU", "loss of the first", "second")
    )
    runs = {f"finetune-vit_base-{file}-h200": name for file, (name, _) in FINETUNED.items()}
    found = {name: load(name) for name in runs}
    for file, data in found.items():
        last = data["epochs"][-1]
        images = last["images_per_second"] * last["seconds"]
        rates = whole(last["images_per_second"]), whole(images / (last["seconds"] - last["seconds_to_first_batch"]))
        losses = [f"{each['train_loss']:.4f}" for each in data["epochs"]]
        shown = rates if len(losses) > 1 else ("", "")
        lines.append(row(runs[file], *shown, f"{last['peak_memory_gib']:.1f}", *losses, *[""] * (2 - len(losses))))
    two = "finetune-vit_base-ddp-h200"
    lines += measured("vit_base_patch16_224, r = 16, bfloat16, compiled, CUDA graphs", {two: found[two]})
    lines[-1] += " FSDP2 by `--fsdp` behind it, one GPU by `python` before it."
    return lines


def hosts() -> list[str]:
    """Models of each library against the faster of themselves unpatched, eager and compiled."""
    runs = {f"hosts-{name}": load(f"hosts-{name}") for name in HOSTS}
    lines = table(
        *(
            "model",
            "batch",
            "unpatched, images/s: eager, compiled",
            "1.5x saved, images/s",
            "of eager",
            "of the faster",
        ),
        *("2x saved, images/s", "of eager", "of the faster", "batch 1, ms: unpatched, 1.5x saved"),
    )
    for name, data in zip(HOSTS, runs.values(), strict=True):
        rates, small = data["images_per_second"], data["batch_1_ms"]
        compiled = rates.get("compiled")
        best = max(rates["eager"], compiled or 0.0)
        cells = []
        for saved in ("1.5x", "2.0x"):
            ratios = (f"{rates[saved] / base:.2f}x" for base in (rates["eager"], best))
            cells += [whole(rates[saved]), *ratios]
        unpatched = f"{whole(rates['eager'])}, {whole(compiled) if compiled else 'not measured'}"
        lines.append(row(name, data["batch"], unpatched, *cells, f"{small['eager']:.1f}, {small['1.5x']:.1f}"))
    return [*lines, *measured("float16, random weights, patched models eager", runs, "hosts")]


def sweep() -> list[str]:
    """vit_base at every r, by both backends."""
    name = "h200-base-sweep"
    data = load(name)
    lines = table("r", "tokens left", "saved arithmetic allows", "kernels", "images/s", "reference", "images/s")
    for r in schedules(data):
        cuda, reference = (find(data, r=r, backend=backend) for backend in ("cuda", "reference"))
        either = cuda or reference
        if either is not None:
            ran = speed(cuda), rate(cuda), speed(reference), rate(reference)
            lines.append(row(r, either["tokens"][-1], allowed(either), *ran))
    return [*lines, *measured(f"{BASE}, batch {data['conditions']['batch size']}, float16, eager", {name: data})]


def reference() -> list[str]:
    """What a GPU makes of the reference, in a sentence."""
    data = load("h200-base-sweep")
    found = [each for each in data["results"] if each["backend"] == "reference" and each["r"] not in ("none", "0")]
    low, high = (each(result["speedup"] for result in found) for each in (min, max))
    said = data["conditions"]
    where = f"{said['model']} at batch {said['batch size']} in {said['dtype']} on an {said['gpu']}"
    return [f"**{low:.2f}x to {high:.2f}x** of unpatched ({where}, r from {found[0]['r']} to {found[-1]['r']})."]


def claim() -> list[str]:
    """The headline in a sentence, for the README."""
    name = "h200-base"
    data = load(name)
    found = [each for r in ("8", "16") if (each := find(data, r=r)) is not None]
    told = [f"{speed(each)} at r = {each['r']} (the saved arithmetic allows {allowed(each)})" for each in found]
    said = data["conditions"]
    where = f"{said['model']} in {said['dtype']} at batch {said['batch size']} on an {said['gpu']}, with the kernels"
    return [f"{where}: **{', '.join(told)}**."]


def agreement() -> list[str]:
    """Agreement of DINOv2 with its real weights on photographs, beside its speed."""
    runs = {name: load(name) for name in ("agreement-dinov2-cpu", "agreement-dinov2-cuda")}
    on_cpu, on_gpu = runs.values()
    lines = table("r", "tokens left", "cosine", "speed-up on a CPU", "speed-up on a GPU, kernels")
    for each in on_cpu["results"]:
        other = find(on_gpu, r=each["r"])
        lines.append(row(each["r"], each["tokens"][-1], f"{each['cosine']:.4f}", speed(each), speed(other)))
    lines.append("")
    for what, (name, data) in zip(("DINOv2 ViT-S/14, ", ""), runs.items(), strict=True):
        said = data["conditions"]
        what += f"{said['data']}, 224 pixels, batch {said['batch size']}, {said['dtype']}"
        lines.append(measured(what, {name: data})[1])
    return lines


def sizes() -> list[str]:
    """The same agreement with sizes in attention, and without."""
    name = "agreement-dinov2-cpu"
    data = load(name)
    lines = table("r", "with sizes", "without")
    lines += [row(each["r"], f"{each['with']:.4f}", f"{each['without']:.4f}") for each in data["sizes"]]
    return [*lines, *measured("128 crops of photographs, 224 pixels, float32", {name: data})]


def _operations() -> tuple[dict[str, Data], dict[tuple[str, str], dict[str, Data]]]:
    """The run, and its results by operation and shape, then backend."""
    data = load("h200-operations")
    found: dict[tuple[str, str], dict[str, Data]] = {}
    for each in data["results"]:
        found.setdefault((each["op"], each["shape"]), {})[each["backend"].partition("/")[0]] = each
    return {"h200-operations": data}, found


def _dtypes(results: list[Data]) -> str:
    return ", ".join(dict.fromkeys(each["dtype"] for each in results))


def _us(result: Data | None) -> str:
    return "" if result is None else f"{result['median_us']:.1f}"


def _ratio(a: Data | None, b: Data | None, digits: str = ".2f") -> str:
    return "" if a is None or b is None else f"{a['median_us'] / b['median_us']:{digits}}"


def operations() -> list[str]:
    """Every operation but attention: the kernels and the reference."""
    runs, found = _operations()
    lines = table("operation", "shape", "us", "TB/s", "reference, us", "faster by")
    shown = [(key, results) for key, results in found.items() if key[0] != "attention" and "torch" not in results]
    for (op, shape), results in shown:
        cuda, reference = results.get("cuda"), results.get("reference")
        bandwidth = "" if cuda is None else f"{cuda['bytes'] / cuda['median_us'] / 1e6:.2f}"
        faster = _ratio(reference, cuda, ".1f")
        lines.append(row(op, shape, _us(cuda), bandwidth, _us(reference), faster and f"{faster}x"))
    every = [each for _, results in shown for each in results.values()]
    copied = every[0]["bytes"] / every[0]["floor_us"] / 1e6
    lines += measured(_dtypes(every), runs)
    lines[-1] += f" A kernel that copies reached {copied:.2f} TB/s in that run."
    return lines


def attention() -> list[str]:
    """Attention with sizes, beside PyTorch's without and with them."""
    runs, found = _operations()
    lines = table("shape", "with sizes, us", "SDPA without sizes, us", "ratio", "SDPA with a mask, us", "ratio")
    every = []
    for (op, shape), results in found.items():
        if op != "attention" or "cuda" not in results:
            continue
        every.append(results["cuda"])
        plain, mask = (found.get((f"sdpa {kind}", shape), {}).get("torch") for kind in ("without sizes", "with a mask"))
        ratios = _ratio(every[-1], plain), _ratio(every[-1], mask)
        lines.append(row(shape, _us(every[-1]), _us(plain), ratios[0], _us(mask), ratios[1]))
    return [*lines, *measured(_dtypes(every), runs)]


TABLES = {
    "cpu": cpu,
    "headline": headline,
    "batches": batches,
    "models": models,
    "hosts": hosts,
    "training": training,
    "processes": processes,
    "sweep": sweep,
    "reference": reference,
    "claim": claim,
    "agreement": agreement,
    "sizes": sizes,
    "operations": operations,
    "attention": attention,
}


def rendered(text: str) -> str:
    """The text with every table between its markers made anew.

    Raises:
        SystemExit: a marker that names no table, or whose end is missing.

    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}: known are {', '.join(TABLES)}")
        if match["end"] is None:
            raise SystemExit(f"the marker <!-- end of {name} --> is missing")
        return f"{match['begin']}\n" + "\n".join(TABLES[name]()) + f"\n{match['end']}"

    marker = r"(?P<begin><!-- (?P<name>\S+): benchmarks/tables\.py -->)(?:.*?(?P<end><!-- end of (?P=name) -->))?"
    return re.sub(marker, made, text, flags=re.DOTALL)


def main() -> int:
    """Write or check."""
    stale = {file: new for file in DOCUMENTS if (new := rendered(file.read_text())) != file.read_text()}
    if "--check" in sys.argv:
        for file in stale:
            print(f"{file.relative_to(ROOT)} does not say what the stored figures say", file=sys.stderr)
        return int(bool(stale))
    for file, text in stale.items():
        file.write_text(text)
    from plots import draw  # which reads what this module loads

    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
