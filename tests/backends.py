"""The one list of what the laws are checked on: every backend on every device it can run on here."""

import cuda_emulator as emulator
import pytest
import torch

from tome import backend

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NO_EXTENSION = pytest.mark.skipif(
    not torch.cuda.is_available() or backend.extension_problem() is not None,
    reason="needs an NVIDIA GPU and the CUDA extension",
)
NO_EMULATOR = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference-cpu"),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=NO_GPU),
    pytest.param(("cuda", "cuda"), id="cuda", marks=NO_EXTENSION),
    pytest.param(("emulated", "cpu"), id="emulated", marks=NO_EMULATOR),
]
