"""The emulated library in the place of ``tome_cuda``'s own: laws run through all of it on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cuda_emulator as emulator
import pytest

from tome import backend, use_backend
from tome_cuda import library, predicates, registration

NAMESPACE = "tome_emulated"


@functools.cache
def _loaded() -> library._Loaded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "find", lambda: Path(emulator.library()._name))
        patch.setattr(library, "_load", functools.cache(library._load.__wrapped__))
        patch.setattr(registration, "NAMESPACE", NAMESPACE)
        registration._register.__wrapped__()
        return library._load()


@contextmanager
def chosen() -> Iterator[None]:
    """Let ``tome.ops`` choose it for tokens on the CPU, as it would choose the kernels for tokens on a GPU."""
    loaded = _loaded()
    with pytest.MonkeyPatch.context() as patch, use_backend("cuda"):
        patch.setattr(library, "_load", lambda: loaded)
        patch.setattr(registration, "NAMESPACE", NAMESPACE)
        patch.setattr(registration, "_register", lambda: True)
        patch.setattr(registration, "_overload", functools.cache(registration._overload.__wrapped__))
        patch.setattr(backend, "extension_problem", lambda: None)
        patch.setattr(predicates, "_lacks", lambda tensor: None)
        emulator.begin()
        yield
        emulator.end()
