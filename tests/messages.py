"""Every message that the packages can print, as templates in which ``…`` stands for what a run fills in.

Of Python: what is raised or warned of, and the reasons that functions of type ``str | None`` give, which others put
behind a colon. Of C++: what TOME_CHECK says; of CMake: errors, warnings. Names are followed to the constant, variable
or function that they stand for, as far as one file goes. ``python tests/messages.py`` prints them by file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = ("reference", "compat", "cuda_ext/tome_cuda")
WARNING = ("warnings.warn", "self.fail")
# Python's own protocol, which no user is meant to read: names of attributes, Ctrl-C, and what is
# caught where it is raised.
SILENT = {"AttributeError", "KeyboardInterrupt", "_Entered", "_unreadable"}
FIELD = "…"


def of_python(path: Path) -> set[str]:
    """The templates of a file."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            scope = _Scope(tree, function)
            for node in _own(function):
                found.update(scope.templates(node))
    return _tidy(found)


class _Scope:
    """Where a name of a function may have come from."""

    def __init__(self, tree: ast.Module, function: ast.FunctionDef) -> None:
        self.gives_reasons = function.returns is not None and ast.unparse(function.returns) == "str | None"
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.values: dict[str, list[ast.expr]] = {}
        for node in (*tree.body, *_own(function)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.values.setdefault(node.targets[0].id, []).append(node.value)

    def templates(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func) not in SILENT:
                yield from self.texts(node.exc.args[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in WARNING:
            yield from self.texts(node.args[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_Loaded":
            yield from self.texts(node.args[1])
        elif isinstance(node, ast.Call) and any(keyword.arg == "err" for keyword in node.keywords):
            yield from self.texts(node.args[0])
        elif isinstance(node, ast.Return) and node.value is not None:
            value = node.value
            if self.gives_reasons:
                yield from self.texts(value)
            elif isinstance(value, ast.Call) and ast.unparse(value.func).endswith("Error"):
                yield from self.texts(value.args[0])

    def texts(self, node: ast.expr, depth: int = 0) -> Iterator[str]:
        """What an expression may say."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else FIELD for part in node.values)
        elif isinstance(node, ast.BoolOp):
            for each in node.values:
                yield from self.texts(each, depth)
        elif isinstance(node, ast.IfExp):
            yield from self.texts(node.body, depth)
            yield from self.texts(node.orelse, depth)
        elif isinstance(node, ast.BinOp):
            yield "".join(next(self.texts(side, depth), FIELD) for side in (node.left, node.right))
        elif isinstance(node, ast.Name) and depth < 2:
            for value in self.values.get(node.id, []):
                yield from self.texts(value, depth + 1)
        elif isinstance(node, ast.Call) and depth < 2:
            if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
                for text in self.texts(node.func.value, depth):
                    yield re.sub(r"\{[^}]*\}", FIELD, text)
            elif isinstance(node.func, ast.Name) and node.func.id in self.functions:
                for inner in _own(self.functions[node.func.id]):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield from self.texts(inner.value, depth + 1)


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function, not those of functions in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(each for each in ast.iter_child_nodes(node) if not isinstance(each, ast.FunctionDef))


def of_cpp(path: Path) -> set[str]:
    """The templates of a file."""
    text = path.read_text()
    found = set()
    for match in re.finditer(r"\bTOME_CHECK\(", text):
        parts = list(_arguments(text, match.end()))[1:]
        if parts != ["..."]:
            found.add("".join(_literal(part) for part in parts))
    return _tidy(found)


def of_cmake(path: Path) -> set[str]:
    """The templates of a file."""
    calls = re.findall(r"message\((?:FATAL_ERROR|WARNING)((?:\s+\"[^\"]*\")+)\)", path.read_text())
    return _tidy({re.sub(r"\$\{\w+\}", FIELD, "".join(re.findall(r'"([^"]*)"', call))) for call in calls})


def _tidy(found: set[str]) -> set[str]:
    """Those that say something, each field once."""
    return {re.sub(f"{FIELD}+", FIELD, text) for text in found if re.search(r"[a-z]{2,} \S", text)}


def _arguments(text: str, at: int) -> Iterator[str]:
    """The arguments of a call whose parenthesis has just been opened."""
    depth, begin = 0, at
    tokens = re.compile(r'"(?:\\.|[^"\\])*"|[()\[\]{},]')
    for token in tokens.finditer(text, at):
        kind = token.group()
        if kind in "([{":
            depth += 1
        elif kind in ")]}" and depth:
            depth -= 1
        elif (kind == "," and not depth) or kind == ")":
            yield text[begin : token.start()].strip()
            begin = token.end()
            if kind == ")":
                return


def _literal(part: str) -> str:
    strings = re.findall(r'"((?:\\.|[^"\\])*)"', part)
    return "".join(strings) if strings and not re.sub(r'"(?:\\.|[^"\\])*"|\s', "", part) else FIELD


def by_file() -> dict[str, set[str]]:
    """All templates, by the file that they stand in."""
    python = {path: of_python(path) for root in PYTHON for path in sorted((ROOT / root).rglob("*.py"))}
    csrc = ROOT / "cuda_ext" / "csrc"
    cpp = {path: of_cpp(path) for path in sorted(csrc.rglob("*")) if path.suffix in (".h", ".cuh", ".cpp", ".cu")}
    cmake = {path: of_cmake(path) for path in [ROOT / "cuda_ext" / "CMakeLists.txt"]}
    return {str(path.relative_to(ROOT)): found for path, found in {**python, **cpp, **cmake}.items() if found}


if __name__ == "__main__":
    for file, templates in by_file().items():
        print(file, *sorted(templates), sep="\n    ")
