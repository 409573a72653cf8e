"""The halves in training under autocast, through the library's own host code and kernels, on a CPU."""

from __future__ import annotations

import emulated
import pytest
import torch
from backends import NO_EMULATOR
from test_halves import FORMS, Half, assert_near, doubled, gradients

import tome_reference
from tome import ops

pytestmark = NO_EMULATOR


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gelu", "merged", "biased"), [("erf", 3, True), ("tanh", 0, False), ("quick", 3, True)])
def test_parameters_that_are_cast(form: str, gelu: str, merged: int, biased: bool) -> None:
    """Parameters, tokens and gradients are float32, products float16."""
    case = Half(2, 9, 2, 32, merged, 1, form, True, True, True, gelu, None, torch.float32, None, biased, 0)
    for name, args in zip(("attend_half", "mlp_half"), case.build("cpu"), strict=True):
        if name == "attend_half" and form != "projected":
            args = (args[0], tuple(t.half() for t in args[1]), *args[2:])
        with emulated.chosen(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda *_: True)
            patch.setattr(torch, "get_autocast_dtype", lambda _: torch.float16)
            ours = gradients(getattr(ops, name), args, 2)
        with torch.autocast("cpu", torch.float16):
            theirs = gradients(getattr(tome_reference, name), args, 2)
        assert_near(ours, theirs, gradients(getattr(tome_reference, name), tuple(map(doubled, args)), 2))
        assert len([grad for grad in ours if grad is not None]) == len(ours) >= 3
