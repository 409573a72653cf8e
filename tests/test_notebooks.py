"""The notebooks in examples/notebooks/: their code runs, on what is small; `nox -s notebooks` has Jupyter run it."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")
NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
SMALL = {
    "validation": {"name": "programs:digits_vit", "schedules": [0, 2]},
    "benchmark": {"name": "programs:vit", "schedules": [0, 4], "batch_size": 1, "runs": 1},
    "visualization": {"name": "programs:vit", "schedules": [4, 8]},
}


def cells(name):
    found = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def parameters(name):
    (cell,) = (each for each in cells(name) if "parameters" in each["metadata"].get("tags", ()))
    exec("".join(cell["source"]), names := {})
    return names


@pytest.fixture
def execute(monkeypatch):
    """A function that runs a notebook with small parameters, and gives its names and what its last cell shows."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(".")  # what the notebook adds to the path is taken off again
    monkeypatch.chdir(NOTEBOOKS)

    def run(name):
        names = {}
        for cell in cells(name):
            code = "".join(cell["source"])
            exec(compile(code, name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= SMALL[name]
        last = code.splitlines()[-1]
        return names, None if last.endswith(";") else eval(last, names)

    return run


def test_all_notebooks_are_here():
    assert sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb")) == sorted(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_are_stored_as_nobody_has_run_them(name):
    """Figures that a reader may rely on are those of the documentation, with their machine."""
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name))
    assert SMALL[name].keys() < parameters(name).keys()


def test_validation(execute, capsys):
    names, _ = execute("validation")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines] == ["unpatched", "r = 0", "r = 2"]
    assert names["found"]["unpatched"].top1 == names["found"]["r = 0"].top1
    assert len(names["axes"].collections) == 3


def test_benchmark(execute, capsys):
    names, _ = execute("benchmark")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines] == ["unpatched", "r = 0", "r = 4"]
    assert [len(line.get_xdata()) for line in names["axes"].lines] == [3, 3]


def test_visualization(execute):
    _, sheet = execute("visualization")
    assert isinstance(sheet, Image.Image)
    assert sheet.width > 3 * 448
    assert sheet.height > 2 * 448
