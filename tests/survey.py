"""Every model that a library can make: is it supported, or why not? ``nox -s survey`` asks all, for docs/hosts.md.

Supported means: with r = 0 the bits of the unpatched model, with a schedule that merges nothing its numbers, with r = 4
the tokens that were planned, and what the unpatched model computes on the full grid if its tokens take the mean of
their group wherever the patched model merges them. There is no third way: anything else is an error.
"""

from __future__ import annotations

import copy
import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import tome
import tome_reference
from tome import schedule, tokens
from tome.patch import timm_host
from tome.patch.model import PatchedModel

PAGE = Path(__file__).parents[1] / "docs" / "hosts.md"
BEGIN, END = "<!-- survey: written by nox -s survey -->\n", "<!-- end of the survey -->\n"
NOTHING = 0.001  # a share of the free tokens that comes to none: all of the merging path, without a merge
R = 4


class Entry(NamedTuple):
    """A model of a library."""

    library: str
    name: str
    family: str  # its class
    variant: str  # what else decides how it is patched
    weights: int  # pretrained ones that the library knows
    make: Callable[[], tuple[nn.Module, Tensor]]  # it, small, in eval mode, and images for it


class Line(NamedTuple):
    """A line of the table."""

    library: str
    families: tuple[str, ...]
    names: int
    weights: int
    outcome: str


class _Made(Exception):  # noqa: N818  # no error
    """What a function of timm's registry would make."""


def _instead(kind: type[nn.Module], *args: Any, **kwargs: Any) -> None:
    raise _Made(kind, kwargs)


@cache
def timm_entries() -> tuple[Entry, ...]:
    """All names of timm, none of which is built for that."""
    weights, entries = Counter(name.partition(".")[0] for name in timm.list_pretrained()), []
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
                stack.enter_context(mock.patch.object(module, "build_model_with_cfg", _instead))
        for name in timm.list_models():
            try:
                timm.model_entrypoint(name)()
            except _Made as made:
                kind, kwargs = made.args
            known = timm_host._lookup("MODELS", _bare(kind)) is not None
            make = partial(_small, name, kwargs) if known else lambda kind=kind: (_bare(kind), torch.empty(0))
            variant = " ".join(f"{part}={_word(kwargs[part])}" for part in VARIANTS if part in kwargs)
            entries.append(Entry(f"timm {timm.__version__}", name, kind.__name__, variant, weights[name], make))
    return tuple(entries)


VARIANTS = ("block_fn", "attn_layer", "attn_type", "rope_type", "use_post_norm", "rel_pos_type", "shared_rel_pos")
LIBRARIES = (timm_entries,)  # to each library its names


def _word(value: Any) -> str:
    value = getattr(value, "func", value)  # of a partial
    return getattr(value, "__name__", str(value))


def _bare(kind: type[nn.Module]) -> nn.Module:
    """Of the class, and nothing in it: enough to be refused."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    return model


def _small(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """Two layers, as narrow and for as few patches as the model's class lets them be."""
    patch, depth = kwargs.get("patch_size") or 16, kwargs.get("depth", 12)
    narrow, head = {"embed_dim": 64, "num_heads": 2}, {"num_classes": 10}
    for key, value in kwargs.items():  # what differs between layers
        if isinstance(value, (tuple, list)) and len(value) == depth:
            narrow[key] = (2, 1) if key == "num_kv_heads" else value[:2]
    for size, wide, more in itertools.product((6 * patch, 84, 96, 192, 224), (narrow, {}), (head, {})):
        torch.manual_seed(0)
        try:
            sized = {"depth": 2, "img_size": size, **wide, **more}
            model = timm.create_model(name, **sized).eval()
            if size < 5 * model.feature_info[-1]["reduction"]:
                raise ValueError(f"{size} pixels are too few tokens")  # of a model with convolutions in front
            with torch.no_grad():
                for parameter in model.parameters():  # so that tokens differ, and zeros are none
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                images = torch.randn(2, model.pretrained_cfg["input_size"][0], size, size).double()
                model.double()(images)  # so that small errors show
        except Exception as error:
            reason = error
            continue
        return model, images
    raise reason


def outcome(entry: Entry) -> str | None:
    """None if it is supported; else why it is refused.

    Raises:
        AssertionError: neither.

    """
    model, images = entry.make()
    try:
        twin = tome.patch.auto(copy.deepcopy(model))
    except tome.UnsupportedModelError as error:
        reason = str(error)
        assert reason
        return reason.partition("is not supported: ")[2] or reason
    path, inner = next((path, part) for path, part in twin.named_modules() if isinstance(part, PatchedModel))
    names, prefix = list(inner._tome_blocks()), inner._tome_prefix()[0]
    with torch.no_grad(), tome.use_backend("reference"):
        expected = _tensors(model(images))
        assert expected
        assert all(map(torch.equal, _tensors(twin(images)), expected))
        twin.r = NOTHING
        _same(twin(images), expected)
        twin.r = R
        with tokens.kept() as kept:
            merged = _tensors(twin(images))
        counts = [step.shape[1] for step in kept[-1].steps] + [kept[-1].count()]
        assert counts == list(schedule.plan(R, len(names), counts[0], prefix).tokens)
        assert counts[0] > counts[-1]
        hooked = copy.deepcopy(model)
        for i, name in enumerate(names):
            block, patched = hooked.get_submodule(f"{path}.{name}".lstrip(".")), inner._tome_blocks()[name]
            watch(block, patched._tome_row, Merged(kept[-1].steps[:i], kept[-1].steps[: i + 1], prefix))
        _same(hooked(images), merged)
        assert not all(map(torch.equal, merged, expected))
    return None


class Merged(NamedTuple):
    """The slot maps of the merges before a block, and those of the merges up to its end."""

    before: tuple[Tensor, ...]
    behind: tuple[Tensor, ...]
    prefix: int

    def mean(self, x: Tensor) -> Tensor:
        """The full grid [B, N, C], in which each token has the mean of its group."""
        slot = tome_reference.follow(self.behind)
        merged, _ = tome_reference.merge(x, slot, int(slot.max()) + 1)
        return tome_reference.unmerge(merged, slot)

    def places(self, n: int) -> Tensor:
        """The token [B, N] in whose place attention sees each token of the full grid."""
        if not self.before:
            return torch.arange(n)[None]
        homes = torch.arange(n).expand(self.before[0].shape[0], n)
        for step in self.before:
            rows = step.tolist()
            first = [[min(i for i, s in enumerate(row) if s == m) for m in range(max(row) + 1)] for row in rows]
            homes = homes.gather(1, torch.tensor(first))
        return homes.gather(1, tome_reference.follow(self.before).long())

    def pairs(self, bias: Tensor) -> Tensor:
        """The bias [1, H, N, N] or [H, N, N] of pairs of tokens in their places: [B, H, N, N]."""
        bias = bias if bias.dim() == 4 else bias[None]
        return torch.cat([bias[:, :, place][:, :, :, place] for place in self.places(bias.shape[3])])

    def rows(self, table: Tensor) -> Tensor:
        """The rows of a table [N - P, D], or one for each head [H, N - P, D]: [B, 1 or H, N - P, D]."""
        table = table if table.dim() == 3 else table[None]
        places = self.places(self.prefix + table.shape[1])[:, self.prefix :] - self.prefix
        return torch.stack([table[:, place] for place in places])

    def members(self, table: Any) -> Any:
        """The rows of what has one for each token of an image [B, N, D]; anything else as it is."""
        if not isinstance(table, Tensor) or table.dim() != 3:
            return table
        places = self.places(table.shape[1]).expand(len(table), -1)
        return torch.stack([row[place] for row, place in zip(table, places, strict=True)])


def watch(block: nn.Module, row: Any, merged: Merged) -> None:
    """Let a block of the unpatched model compute on the full grid what the patched one does with merged tokens."""
    name = row.mlp if row.is_post else row.norm2 or row.mlp
    mlps = getattr(block, name) if name else ()  # of some blocks tokens merge behind all of it
    for mlp in mlps if isinstance(mlps, (nn.ModuleList, tuple)) else (mlps,):
        mlp.register_forward_pre_hook(lambda module, args: (merged.mean(args[0]), *args[1:]))
    block.register_forward_hook(lambda module, args, out: merged.mean(out))
    block.register_forward_pre_hook(partial(_place, merged), with_kwargs=True)
    for module in block.modules():  # whose own biases of pairs are computed inside
        for own in ("get_bias", "_get_rel_pos_bias"):
            if hasattr(module, own):
                setattr(module, own, partial(_paired, merged, getattr(module, own)))


def _paired(merged: Merged, whole: Callable[[], Tensor]) -> Tensor:
    return merged.pairs(whole())


def _place(merged: Merged, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    args = (args[0], *map(merged.members, args[1:]))
    for name, moved in (("rope", merged.rows), ("shared_rel_pos_bias", merged.pairs), ("shared_rel_pos", merged.pairs)):
        if kwargs.get(name) is not None:
            kwargs = {**kwargs, name: moved(kwargs[name])}
    return args, kwargs


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _same(output: Any, expected: list[Tensor]) -> None:
    for ours, theirs in zip(_tensors(output), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def lines(outcomes: Iterable[tuple[Entry, str | None]]) -> list[Line]:
    """A line for each class that is supported, and one for each reason to refuse others."""
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry, reason in outcomes:
        groups[entry.library, f"yes {entry.family}" if reason is None else f"no: {reason}"].append(entry)
    made = [
        Line(
            library,
            tuple(sorted({entry.family for entry in entries}, key=str.lower)),
            len(entries),
            sum(entry.weights for entry in entries),
            "yes" if told.startswith("yes ") else told,
        )
        for (library, told), entries in groups.items()
    ]
    return sorted(made, key=lambda line: (line.outcome != "yes", line.library, -line.names))


def table(made: list[Line]) -> str:
    """As Markdown, between the markers."""
    head = "| library | class | names | pretrained weights | supported |\n| --- | --- | --- | --- | --- |\n"
    rows = (
        f"| {line.library} | {', '.join(line.families)} | {line.names} | {line.weights} | {line.outcome} |\n"
        for line in made
    )
    return BEGIN + head + "".join(rows) + END


def read(text: str) -> list[Line]:
    """The lines of such a table."""
    found = re.search(f"{re.escape(BEGIN)}(.*){re.escape(END)}", text, re.DOTALL)
    assert found
    cells = [row.strip("| ").split(" | ") for row in found[1].splitlines()[2:]]
    return [Line(a, tuple(b.split(", ")), int(c), int(d), e) for a, b, c, d, e in cells]


def main() -> None:
    """Ask all, and write the table."""
    outcomes, failed = [], []
    for entry in (entry for entries in LIBRARIES for entry in entries()):
        try:
            outcomes.append((entry, outcome(entry)))
        except Exception as error:
            failed.append(f"{entry.name}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
    supported = sum(reason is None for _, reason in outcomes)
    print(f"{supported} supported, {len(outcomes) - supported} refused, {len(failed)} neither")
    if failed:
        sys.exit(1)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + table(lines(outcomes)) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
