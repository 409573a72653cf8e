"""Every Python block of the README and of the pages in docs runs; every command line is one that its program takes.

Blocks for a GPU run where there is one. Three pages have tests of their own, which also see that they do what is said.
"""

import re
from pathlib import Path

import click
import pytest
import torch
from entry import run as run_tome
from pages import FOR_A_GPU, PAGES, ROOT, blocks, commands, place, run, words

from tome.cli.commands import cli

__all__ = ["place"]

OWN_TESTS = {
    "docs/matching.md": "test_docs",
    "docs/own-model.md": "test_own_model",
    "docs/diffusers.md": "test_diffusers",
}
WITH_CODE = [page for page in PAGES if blocks(page, "python") and page not in OWN_TESTS]
WITH_A_GPU = [page for page in WITH_CODE if any(map(FOR_A_GPU.search, blocks(page, "python")))]
COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, place):
    for library in set(re.findall(r"(?:import|from) (open_clip|torchvision|transformers|diffusers)", PAGES[page])):
        pytest.importorskip(library)
    names = run(page, on_a_gpu=False)
    assert names.keys() - {"__name__", "__builtins__"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("page", WITH_A_GPU)
def test_the_code_of_a_page_runs_on_a_gpu(page, place):
    for library in set(re.findall(r"(?:import|from) (open_clip|torchvision|transformers|diffusers)", PAGES[page])):
        pytest.importorskip(library)
    run(page, on_a_gpu=True)


@pytest.mark.parametrize(("page", "tests"), OWN_TESTS.items())
def test_pages_with_tests_of_their_own(page, tests):
    assert Path(page).name in (ROOT / "tests" / f"{tests}.py").read_text()


def test_the_readme_and_the_quick_start_have_a_block_for_each():
    assert "README.md" in WITH_CODE
    assert "docs/index.md" in WITH_A_GPU


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command, place):
    program, *arguments = words(command)
    if program == "torchrun" and "-m" in arguments:
        program, *arguments = arguments[arguments.index("--") + 1 :]
    if program == "torchrun":
        program, *arguments = "python", *arguments[arguments.index("--") + 1 :]
    if program == "tome":
        (place / "model.pt").touch()
        parent = click.Context(cli, info_name="tome")
        name, found, rest = cli.resolve_command(parent, arguments)
        found.make_context(name, rest, parent=parent)
    elif program == "python":
        assert (ROOT / arguments[0]).exists() or arguments[0] in ("-m", "-c")
    elif program == "nox":
        sessions = re.findall(
            r"^@nox\.session.*?^def (\w+)", (ROOT / "noxfile.py").read_text(), re.DOTALL | re.MULTILINE
        )
        assert arguments[0] in ("-s", "-l")
        named = arguments[1 : arguments.index("--")] if "--" in arguments else arguments[1:]
        assert set(named) <= set(sessions)
    else:
        assert program == "pip"


@pytest.mark.parametrize(
    "command", [each for each in commands("docs/index.md") if re.match("tome (bench|evaluate) vit", each)]
)
def test_commands_of_the_quick_start_run(command, place, capsys):
    """On a small model with random weights, the shortest run of each."""
    _, name, _, *rest = words(command)
    small = ["--random-weights", "--batch-size", "2"] if name == "evaluate" else ["--runs", "1", "--batch-size", "1"]
    code, out, err = run_tome(capsys, name, "test_vit", *rest, *small, "--device", "cpu")
    assert code == 0, err
    assert re.search(r"^ 8 .*x", out, re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    """The site's build sees to links between its pages, not to pictures, nor to files outside of it."""
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
