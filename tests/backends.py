"""The one list of what the laws are checked on: every backend on every device it can run on here."""

import pytest
import torch

from tome import backend

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NO_EXTENSION = pytest.mark.skipif(
    not torch.cuda.is_available() or backend.extension_problem() is not None,
    reason="needs an NVIDIA GPU and the CUDA extension",
)

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference-cpu"),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=NO_GPU),
    pytest.param(("cuda", "cuda"), id="cuda", marks=NO_EXTENSION),
]
