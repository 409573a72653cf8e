"""The code of docs/matching.md runs, in its order, and does what the text says."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from strategies import cases

import tome
from tome import ops

PAGE = (Path(__file__).parents[1] / "docs" / "matching.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run(*blocks):
    """What the blocks define."""
    names = {}
    for block in blocks:
        exec(compile(block, "docs/matching.md", "exec"), names)
    return names


neighbours = run(BLOCKS[0])["neighbours"]


def joins_only_neighbours(slot):
    steps = slot.diff(dim=1)
    return bool(((steps == 0) | (steps == 1)).all())


def test_the_function_has_ten_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line]
    assert len(lines) <= 10


@given(case=cases(heads=(1, 2, 3, 6)))
def test_the_function_keeps_the_contract(device, case):
    assume(case.merged > 0)
    slot = neighbours(case.keys(device), case.merged, case.prefix)
    assert slot.dtype == torch.int32
    assert slot.shape == (case.batch, case.n)
    for row in slot.tolist():
        assert sorted(set(row)) == list(range(case.tokens))
        assert row[: case.prefix] == list(range(case.prefix))
        assert min(row[case.prefix :]) == case.prefix
    assert joins_only_neighbours(slot)
    x = torch.randn(case.batch, case.n, 5, device=device)
    merged, size = ops.merge(x, slot, case.tokens)
    assert size.sum(dim=1).eq(case.n).all()
    kept = ops.unmerge(size[:, :, None], slot)[:, :, 0] == 1
    assert torch.equal(ops.unmerge(merged, slot)[kept], x[kept])


def test_the_function_merges_what_is_most_alike():
    keys = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    keys[:, :, 5] = keys[:, :, 4]
    keys[:, :, 9] = keys[:, :, 8]
    assert neighbours(keys, 2, 1).tolist() == [[0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9]]


def test_a_model_merges_by_the_function():
    names = run(*BLOCKS[:2])
    assert names["logits"].shape == (2, 1000)
    assert torch.isfinite(names["logits"]).all()
    tokens = tome.merged(names["model"], names["images"])
    assert tokens.x.shape == (2, 197 - 12 * 8, 192)
    assert joins_only_neighbours(tokens.slot)


def test_a_map_that_is_not_onto_is_an_error_on_a_cpu():
    names = run(*BLOCKS[:2])
    tome.patch.timm(names["model"], matching=lambda keys, r, prefix: neighbours(keys, r, prefix) // 2)
    names["model"].r = 8
    with pytest.raises(ValueError, match="onto"):
        names["model"](names["images"])


def test_all_blocks_run_in_order():
    names = run(*BLOCKS)
    tokens, grid = names["tokens"], names["grid"]
    assert names["model"].r == (8, -1.0)
    assert not joins_only_neighbours(tokens.slot)
    assert tokens.size.dtype == torch.float32
    assert tokens.size.sum(dim=1).eq(197).all()
    assert grid.shape == (2, 197, 192)
    torch.testing.assert_close(names["pooled"], grid.mean(dim=1))
