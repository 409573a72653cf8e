"""The tables of the README and of the pages in docs say what the stored figures say."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "tables.py"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(TABLES.parent)
    import tables

    return tables


def test_the_tables_are_those_of_the_stored_figures():
    result = subprocess.run([sys.executable, str(TABLES), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stderr}\nrun python benchmarks/tables.py"


def test_every_table_stands_in_a_document(tables):
    readme, *pages = [re.findall(r"<!-- (\S+): benchmarks/tables", file.read_text()) for file in tables.DOCUMENTS]
    assert readme == ["agreement", "claim", "reference"]
    assert sorted(name for page in pages for name in page) == sorted(set(tables.TABLES) - {"claim"})


def test_an_edited_table_is_noticed(tables):
    for file in tables.DOCUMENTS:
        text = file.read_text()
        edited = re.sub(r"(tables\.py -->.*?)(\d\.\d+)", r"\g<1>9\2", text, flags=re.DOTALL)
        assert tables.rendered(edited) == text != edited


def test_bad_markers_are_named(tables):
    with pytest.raises(SystemExit, match="no table 'speed'"):
        tables.rendered("<!-- speed: benchmarks/tables.py --><!-- end of speed -->")
    with pytest.raises(SystemExit, match="end of headline"):
        tables.rendered("<!-- headline: benchmarks/tables.py -->\n<!-- end of models -->")


@pytest.fixture
def results(tables, monkeypatch, tmp_path):
    """A function that stores the figures again, changed."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    stored = {file.stem: json.loads(file.read_text()) for file in (TABLES.parent / "results").glob("*.json")}
    stored = {name: data for name, data in stored.items() if not name.startswith("diffusion")}

    def store(change):
        for name, data in copy.deepcopy(stored).items():
            change(name, data)
            (tmp_path / f"{name}.json").write_text(json.dumps(data))

    return store


def test_slower_rows_other_machines_and_other_schedules(tables, results):
    def change(name, data):
        data["conditions"]["gpu" if "gpu" in data["conditions"] else "cpu"] = f"machine of {name}"
        for each in data.get("results", []):
            if "speedup" in each:
                each["speedup"] /= 2
        if "batch" in name:
            data["results"].append({**data["results"][-1], "r": "24", "speedup": 0.75})

    results(change)
    made = {name: make() for name, make in tables.TABLES.items()}
    halved = json.loads((tables.RESULTS / "h200-base.json").read_text())["results"][1]["speedup"]
    assert halved < 1
    assert f"{halved:.2f}x" in "\n".join(made["headline"])
    slower = [each["speedup"] for each in json.loads((tables.RESULTS / "h200-base-sweep.json").read_text())["results"]]
    assert f"**{min(slower):.2f}x to " in made["reference"][0]
    assert all(f"machine of h200-base{part}," in made["headline"][-1] for part in ("", "-autocast", "-compiled"))
    assert made["batches"][0].endswith("| r = 24 |")
    assert all(line.endswith("| 0.75x |") for line in made["batches"][2:10])
    for lines in made.values():
        assert len({line.count("|") for line in lines if line.startswith("|")}) <= 1


def test_a_run_without_some_results(tables, results):
    def change(name, data):
        if name == "h200-operations":
            new = {**data["results"][1], "op": "restore", "median_us": 50.0}
            kept = [each for each in data["results"] if each["op"] != "sdpa with a mask"]
            data["results"] = [each for each in kept if each["backend"] != "reference/cuda"] + [new]
        elif name != "cpu-vit_small" and "results" in data:
            data["results"] = [each for each in data["results"] if each["r"] != "(8, -1.0)"]

    results(change)
    made = {name: "\n".join(make()) for name, make in tables.TABLES.items()}
    assert "| restore | B256 N197 H12 D64 r16 | 50.0 | 1.55 |  |  |" in made["operations"]
    assert "| 110.5 | 168.3 | 0.66 |  |  |" in made["attention"]
    assert "(8, -1.0)" not in made["headline"]


def test_a_missing_file_is_named_with_its_command(tables, results):
    results(lambda name, data: None)
    (tables.RESULTS / "h200-base.json").unlink()
    with pytest.raises(SystemExit, match=r"h200-base\.json is missing.*tome bench vit_base"):
        tables.headline()


def test_agreement_on_a_gpu_stands_beside_that_on_a_cpu(tables, results):
    def change(name, data):
        if name == "agreement-dinov2-cuda":
            data["results"][1]["speedup"] = 0.12
            data["conditions"]["gpu"], data["conditions"]["driver"] = "some GPU", "600"

    results(change)
    head, _, first, second, *rest = tables.agreement()
    assert (head.count("speed-up"), first.count("1.00x")) == (2, 2)
    assert second.endswith("x | 0.12x |")
    assert "some GPU, driver 600" in rest[-1]


def test_the_plots_are_drawn(tables, results, monkeypatch, tmp_path):
    results(lambda name, data: None)
    import plots

    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    plots.draw()
    for name in ("throughput_h200.png", "agreement.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800
