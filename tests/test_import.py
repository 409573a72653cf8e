"""Importing tome: every name is there, and nothing loads before it is used."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tome


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_and_module_is_there_after_import_tome():
    modules = {module.name for module in pkgutil.iter_modules(tome.__path__)} - {"__main__"}
    names = sorted(modules | set(tome.__all__))
    code = (
        "import sys, torch\n"
        f"for name in {names}:\n"
        "    for module in [m for m in sys.modules if m.split('.')[0] == 'tome']:\n"
        "        del sys.modules[module]\n"
        "    import tome\n"
        "    print(getattr(tome, name).__name__.split('.')[-1])"
    )
    assert printed(code).split() == names
    assert set(tome.__all__) <= set(dir(tome))


def test_what_type_checkers_see_is_what_runs():
    tree = ast.parse(Path(tome.__file__).read_text())
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [(node.module, alias.name) for node in branch.body for alias in node.names]
    assert sorted(name for _, name in seen) == sorted(tome.__all__)
    for module, name in seen:
        assert getattr(tome, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tome' has no attribute 'mrege'"):
        tome.mrege  # noqa: B018
    assert not hasattr(tome, "__wrapped__")


def test_a_name_that_loads_while_it_is_compiled():
    code = (
        "import torch, tome\n"
        "f = torch.compile(lambda x, s: tome.unmerge(x, s), backend='eager', fullgraph=True)\n"
        "x, slot = torch.ones(1, 2, 3), torch.zeros(1, 4, dtype=torch.int32)\n"
        "print(tuple(f(x, slot).shape))"
    )
    assert printed(code) == "(1, 4, 3)"


def test_schedules_are_read_without_torch():
    code = "import sys, tome; tome.schedule.per_layer(12, (8, -1.0)); print('torch' in sys.modules)"
    assert printed(code) == "False"
    assert torch.__name__ in sys.modules  # here it is loaded: the name to look for is right
