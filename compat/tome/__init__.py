"""Token merging (ToMe, arXiv 2210.09461): faster Vision Transformers by merging similar tokens.

    import tome

    tome.patch.timm(model)
    model.r = 8

See ``tome.ops`` for the operations, ``tome.schedule`` for what ``r`` may be, ``tome.set_backend`` for who computes.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

__all__ = [
    "BackendError",
    "Tokens",
    "UnsupportedModelError",
    "backend",
    "cost",
    "data",
    "datasets",
    "evaluate",
    "get_backend",
    "measure",
    "merge",
    "merged",
    "ops",
    "patch",
    "report",
    "schedule",
    "set_backend",
    "unmerge",
    "unpatch",
    "use_backend",
    "utils",
    "vis",
]

# Each name loads when it is first used: PyTorch takes seconds, which the help of the command line must not.
_HOMES = {
    "BackendError": "backend",
    "Tokens": "tokens",
    "UnsupportedModelError": "patch",
    "get_backend": "backend",
    "merged": "patch",
    "set_backend": "backend",
    "unmerge": "ops",
    "unpatch": "patch",
    "use_backend": "backend",
}

if TYPE_CHECKING:  # what type checkers and editors see
    from tome import backend, cost, data, datasets, evaluate, measure, merge, ops, patch, report, schedule, utils, vis
    from tome.backend import BackendError, get_backend, set_backend, use_backend
    from tome.ops import unmerge
    from tome.patch import UnsupportedModelError, merged, unpatch
    from tome.tokens import Tokens
else:

    def __getattr__(name):
        home = _HOMES.get(name)
        if home is not None:
            value = getattr(import_module(f"tome.{home}"), name)
        elif name.startswith("_") or find_spec(f"tome.{name}") is None:
            raise AttributeError(f"module 'tome' has no attribute {name!r}")
        else:
            value = import_module(f"tome.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
