"""What docs/api.md shows of docstrings: roles such as :func:`tome.merged` become plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Strip the roles of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":(?:func|mod|class|data|meth):`~?([^`]+)`", r"`\1`", obj.docstring.value)
