"""Helpers under the names that existing scripts use, and the bridge from slot maps to adjacency matrices."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tome import schedule

__all__ = ["adjacency", "benchmark", "parse_r"]


def parse_r(num_layers: int, r: schedule.Schedule) -> list[int]:
    """Spread a schedule of whole tokens over layers (appendix B): int, (r, inflection) or list.

    Raises:
        TypeError, ValueError: not such a schedule; a ratio depends on the tokens, see :func:`tome.schedule.plan`.

    """
    if isinstance(r, float):
        raise TypeError(f"the ratio {r} gives no fixed r per layer; use tome.schedule.plan")
    return cast("list[int]", list(schedule.per_layer(num_layers, r)))


def adjacency(slot: Tensor) -> Tensor:
    """The matrix [B, M, N] of a slot map int32 [B, N]: 1 where input token j went into output token i, else 0."""
    tokens = int(slot.max()) + 1 if slot.numel() else 0
    return (slot[:, None, :] == torch.arange(tokens, device=slot.device)[None, :, None]).float()


def benchmark(
    model: nn.Module,
    device: torch.device | str | int = 0,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Throughput of a model on random images.

    Args:
        model: moved to ``device`` and set to eval mode.
        device: where it runs.
        input_size: channels, height and width.
        batch_size: images per pass.
        runs: passes, of which the first ``runs * throw_out`` are not counted.
        throw_out: the share of passes that only warm up, in [0, 1).
        use_fp16: half inputs under autocast.
        verbose: show a progress bar and print the result.

    Returns:
        Images per second.

    Raises:
        ValueError: counts that leave nothing to measure, or a GPU that is not there.

    """
    from tome import measure  # loads the progress bar

    device = measure.checked_device(device)
    if batch_size < 1 or runs < 1 or not 0.0 <= throw_out < 1.0:
        raise ValueError(
            f"need batch_size >= 1, runs >= 1 and throw_out in [0, 1), got {batch_size}, {runs}, {throw_out}"
        )
    model = model.eval().to(device)
    x = torch.rand(batch_size, *input_size, device=device, dtype=torch.half if use_fp16 else torch.float32)
    warm_up = int(runs * throw_out)
    with torch.autocast(device.type, torch.float16, enabled=use_fp16):
        seconds = measure.time_calls({"": lambda: model(x)}, device, warm_up, runs - warm_up, verbose)[""]
    throughput = batch_size * len(seconds) / sum(seconds)
    if verbose:
        print(f"Throughput: {throughput:.2f} im/s")
    return throughput
