"""docs/messages.md has every message of the code, and none that the code has no more."""

import re
from pathlib import Path

import messages
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "messages.md"


def on_the_page():
    """What stands in the first cell of a row, or is the item of a list."""
    found = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
        elif item := re.fullmatch(r" *- `([^`]+)`", line):
            found.append(item[1])
    return found


def test_the_page_is_complete_and_has_nothing_else():
    by_file = messages.by_file()
    page, code = set(on_the_page()), set().union(*by_file.values())
    missing = {text: file for file, texts in by_file.items() for text in texts - page}
    assert not missing, f"say in docs/messages.md why, and what helps: {missing}"
    assert not page - code, "docs/messages.md has messages that no code has"


def test_no_message_stands_twice():
    page = on_the_page()
    assert len(page) == len(set(page))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x):\n    raise ValueError(f'x must be {x}, got {x!r}{x}')", {"x must be …, got …"}),
        ("def f(x):\n    reason = 'no kernel here'\n    raise ValueError(reason)", {"no kernel here"}),
        ("GAPS = 'there are gaps'\ndef f(x) -> str | None:\n    return g(x) or GAPS", {"there are gaps"}),
        ("def f(x) -> str | None:\n    return None if x else 'there is none'", {"there is none"}),
        ("def f(x) -> str:\n    return 'this is no message'", set()),
        ("def f(x):\n    raise _lacks(x)\ndef _lacks(x):\n    return DataError(f'{x} is lost')", {"… is lost"}),
        ("P = 'not a name: {!r}'\ndef f(x):\n    raise ValueError(P.format(x))", {"not a name: …"}),
        ("def f(x):\n    raise ValueError(g(x))\ndef g(x):\n    return 'what went wrong'", {"what went wrong"}),
        ("def f(x):\n    warnings.warn('this is slow', stacklevel=2)", {"this is slow"}),
        ("def f(x):\n    raise AttributeError('no such name')", set()),
    ],
)  # fmt: skip
def test_messages_of_python_are_found(tmp_path, code, expected):
    file = tmp_path / "code.py"
    file.write_text(code)
    assert messages.of_python(file) == expected


def test_messages_of_cpp_and_cmake_are_found(tmp_path):
    file = tmp_path / "code.cpp"
    file.write_text(
        '#define TOME_CHECK(...) X(__VA_ARGS__)\nTOME_CHECK(f(a, b) && c[0, 1], "x must be [", n, ", ", g(m, 2),\n'
        '  "] and " "whole");\nTOME_CHECK(a, name, " must be, (really)");'
    )
    assert messages.of_cpp(file) == {"x must be […, …] and whole", "… must be, (really)"}
    file.write_text('message(STATUS "all is well")\nmessage(FATAL_ERROR "needs torch ${V}; "\n   "see above")')
    assert messages.of_cmake(file) == {"needs torch …; see above"}
