"""What every patched model has, whatever library it is of: ``r``, ``_tome_info``, :func:`merged`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tome import schedule
from tome.patch.block import MergingBlock
from tome.patch.plain import has_hooks
from tome.patch.row import BlockSettings, ModelSettings
from tome.patch.swap import Patched, UnsupportedModelError, swap
from tome.tokens import Tokens, kept, read_by, restored
from tome.utils import adjacency


class PatchedModel(Patched):
    """Mixed into a host's model. The host's class says where the blocks are and which tokens are protected."""

    _tome: ModelSettings
    _tome_r: schedule.Schedule

    def _tome_blocks(self) -> dict[str, MergingBlock]:
        """The blocks by their names, in their order."""
        raise NotImplementedError

    def _tome_prefix(self) -> tuple[int, bool, bool]:
        """How many leading tokens are protected, and whether a class and a distillation token are among them."""
        raise NotImplementedError

    def _tome_length(self) -> int | None:
        """How many tokens enter the first block, where that is known before an image is."""
        raise NotImplementedError

    @property
    def r(self) -> schedule.Schedule:
        """The schedule: int, (r, inflection), list or float ratio (:mod:`tome.schedule`)."""
        return self._tome_r

    @r.setter
    def r(self, value: schedule.Schedule) -> None:
        settings, blocks = self._tome, self._tome_blocks()
        prefix, length = self._tome_prefix()[0], self._tome_length()
        entries = schedule.per_layer(len(blocks), value)
        if length is not None and settings.matching.name != "kth":
            schedule.warn_if_clipped(value, len(blocks), length, prefix)
        self._tome_r = value
        for i, (name, block) in enumerate(blocks.items()):
            ratio, is_last = entries[i].as_integer_ratio(), i == len(blocks) - 1
            block._tome = BlockSettings(name, ratio, prefix, i == 0, is_last, settings)

    @property
    def _tome_merges(self) -> bool:
        """Whether any block may merge tokens."""
        return any(block._tome.entry for block in self._tome_blocks().values())

    @property
    def _tome_info(self) -> Mapping[str, Any]:
        """What scripts for the original package read; size and source are those of the last pass."""
        blocks = list(self._tome_blocks().values())
        size, slot = blocks[-1]._tome_last
        _, has_class, has_distillation = self._tome_prefix()
        return MappingProxyType(
            {
                "r": [block._tome.entry for block in blocks],
                "size": None if size is None else size[:, :, None],
                "source": None if slot is None else adjacency(slot),
                "trace_source": self._tome.trace_source,
                "prop_attn": self._tome.prop_attn,
                "class_token": has_class,
                "distill_token": has_distillation,
            }
        )


class ReadByForward(PatchedModel):
    """Mixed into a model whose forward may read protected tokens alone: the last block then asks it."""

    _tome_before: tuple[str, ...]  # the names of what runs before the blocks

    def _tome_checkpoints(self) -> bool:
        """Whether its blocks run in checkpoints, as the library makes them."""
        return getattr(self, "grad_checkpointing", False)

    def _tome_watches_before(self) -> bool:
        """Whether somebody watches what runs before the blocks, and may run them too."""
        parts = filter(None, map(cast(Any, self)._modules.get, self._tome_before))
        return any(has_hooks(module) for part in parts for module in part.modules())

    def _tome_reads_prefix(self, last: MergingBlock) -> bool:
        """Whether its forward reads only protected tokens of the last block, and nobody sees others on the way."""
        raise NotImplementedError

    def _tome_is_hosts(self, host: str, methods: tuple[str, ...], modules: Iterable[nn.Module]) -> bool:
        """Whether forward and these methods are those of the host's class, and nobody watches the modules."""
        return (
            _are_hosts(type(self), host, methods)
            and not any(name in self.__dict__ for name in methods)
            and not any(has_hooks(module) for module in modules)
        )

    def __init_subclass__(cls) -> None:
        """Give the class that is made for a host a forward with the host's signature, which torch.export reads."""
        super().__init_subclass__()
        if "_tome_base" in vars(cls):
            cls.forward = _reading(cls)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _are_hosts(kind: type[PatchedModel], host: str, methods: tuple[str, ...]) -> bool:
    found = {"forward": kind._tome_base.forward, **{name: getattr(kind, name) for name in methods}}
    return all(
        not hasattr(method, "__wrapped__")  # whose name is that of what it wraps
        and f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', '')}" == f"{host}.{name}"
        for name, method in found.items()
    )


def _reading(kind: type[ReadByForward]) -> Callable[..., Any]:
    @functools.wraps(kind._tome_base.forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Asked here, as a checkpoint turns gradients off within, and a hook that runs the blocks may be gone by then.
        is_asked = not (torch.is_grad_enabled() or self._tome_checkpoints() or self._tome_watches_before())
        with read_by(self if is_asked else None):
            return super(kind, self).forward(*args, **kwargs)

    return run


class Intermediates(PatchedModel):
    """Mixed into a model that gives out what its middle blocks made: those of timm and open_clip."""

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As in the host's library: what it records of the blocks between is restored to the full grid."""
        return restored(super().forward_intermediates(*args, **kwargs))  # type: ignore[misc]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As in the host's library; the schedule is spread over the blocks that are left."""
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self.r = self.r[: len(self._tome_blocks())] if isinstance(self.r, list) else self.r
        return taken


class PassedOn:
    """An attribute of a wrapper that is the patched model's inside, and would be lost without a word if set on it."""

    def __init__(self, inner: str, name: str) -> None:
        self.inner, self.name = inner, name

    def __get__(self, wrapper: Any, kind: type | None = None) -> Any:
        inner = getattr(wrapper, self.inner, None)
        if isinstance(inner, PatchedModel | Holder):
            return getattr(inner, self.name)
        try:
            return vars(wrapper)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, wrapper: Any, value: Any) -> None:
        inner = getattr(wrapper, self.inner)
        if isinstance(inner, PatchedModel | Holder):
            setattr(inner, self.name, value)
        else:
            vars(wrapper)[self.name] = value


class Holder(Patched):
    """Mixed into a model around the patched one, with a head or a text tower beside it."""

    _tome_path: str

    @property
    def _tome_inner(self) -> nn.Module:
        return cast(nn.Module, self).get_submodule(self._tome_path)

    r, _tome_info = PassedOn("_tome_inner", "r"), PassedOn("_tome_inner", "_tome_info")


def begin(model: nn.Module, kind: type[PatchedModel], settings: ModelSettings) -> None:
    """Make a model whose blocks are patched one that has ``r``, which is 0."""
    swap(model, kind)
    patched = cast(PatchedModel, model)
    patched._tome = settings
    patched.r = 0


def hold(model: nn.Module, path: str) -> None:
    """Let a model pass ``r`` and ``_tome_info`` on to the patched one in it."""
    if path:
        swap(model, Holder)
        cast(Holder, model)._tome_path = path


def patched_in(model: nn.Module) -> PatchedModel | None:
    """The patched model in wrappers, or the model itself; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, PatchedModel)), None)


def pass_on(wrapper: type[nn.Module], inner: str) -> None:
    """Let a class of wrappers pass ``r`` and ``_tome_info`` on to the patched model in its attribute ``inner``."""
    for name in ("r", "_tome_info"):
        setattr(wrapper, name, PassedOn(inner, name))


for _wrapper in (nn.DataParallel, DistributedDataParallel):
    pass_on(_wrapper, "module")


def merged(model: nn.Module, *args: Any, **kwargs: Any) -> Tokens:
    """The merged tokens, for who feeds fewer of them to what follows: the model runs, and its grid is not used.

    Args:
        model: a patched model, or a wrapper around one.
        *args: what the model is called with: images.
        **kwargs: likewise.

    Returns:
        The tokens behind the last block, before the model's last norm: ``x`` [B, M, C], ``size`` float32 [B, M] and
        ``slot`` int32 [B, N], where each of the N tokens that entered the first block is now.

    Raises:
        UnsupportedModelError: the model is not patched.

    """
    with kept() as tokens:
        model(*args, **kwargs)
    if not tokens:
        raise UnsupportedModelError(f"{type(model).__name__} runs no patched block in this thread: patch it first")
    return tokens[-1].complete()
