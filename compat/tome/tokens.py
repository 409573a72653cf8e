"""What travels between the blocks of a patched model: merged tokens that pass for the full grid of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree

from tome import backend, ops
from tome_reference.halves import dropped

Linear: TypeAlias = tuple[Tensor, Tensor | None]  # weight and bias
# The size of a padded token: nothing beside a real one, yet a number to divide by, and one whose logarithm is finite.
PADDING = 2.0**-100
MANY_ROWS = 4096  # of tokens, in all images together


class Norm(NamedTuple):
    """A plain LayerNorm, and the dtype that its only reader wants (None: that of the tokens)."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dtype: torch.dtype | None = None


# One call takes less of the host's time than its parts, even if nobody reads what it norms.
UNREAD = Norm(None, None, 1.0)


class Branch(NamedTuple):
    """What is to be added to x, or to its last tokens: value [B, N, C], times gamma [C] where there is a LayerScale."""

    value: Tensor
    gamma: Tensor | None = None

    def add(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
        """X + gamma * value and, where a norm is given, its norm."""
        x, y, _ = add(x, self, None, x.shape[1], None, norm)
        return x, y


class MlpParts(NamedTuple):
    """What an MLP of Linear, GELU, Linear computes with, the LayerScale behind it included."""

    fc1: Linear
    gelu: str  # "erf", "tanh" or "quick"
    fc2: Linear
    gamma: Tensor | None = None
    drop: Tensor | None = None  # [B], what stochastic depth leaves of each image's branch

    def has_kernel(self, y: Tensor) -> bool:
        """Whether there may be a kernel for its activation."""
        return self.gelu == "quick" or backend.takes_kernels(y)

    def value(self, y: Tensor) -> Tensor:
        """What the MLP makes of its tokens, before scale."""
        if self.gelu == "quick":
            hidden = ops.quick_gelu(F.linear(y, *self.fc1))
        else:
            hidden = ops.linear_gelu(y, *self.fc1, "tanh" if self.gelu == "tanh" else "none")
        return F.linear(hidden, *self.fc2)


class GatedParts(NamedTuple):
    """What an MLP computes with whose hidden layer is silu(gate) * x."""

    fc1: tuple[Linear, ...]  # one layer for gate and x side by side, or one for each
    is_gate_last: bool
    norm: Norm | None  # of the hidden layer
    fc2: Linear
    gamma: Tensor | None = None

    def has_kernel(self, y: Tensor) -> bool:
        """Whether there may be a kernel for its activation."""
        return True

    def value(self, y: Tensor) -> Tensor:
        """What the MLP makes of its tokens, before scale."""
        width, extra = self.fc2[0].shape[1], self._extra(y)
        layers = self.fc1 if not extra else [self._filled(layer, extra) for layer in self.fc1]
        made = [F.linear(y, *layer) for layer in layers]
        gate, x = made if len(made) == 2 else made[0].chunk(2, dim=-1)
        gate, x = (x, gate) if self.is_gate_last else (gate, x)
        hidden = ops.swiglu(gate, x) if self.norm is None else ops.swiglu_norm(gate, x, width, *self.norm[:3])
        weight, bias = self.fc2
        return F.linear(hidden, F.pad(weight, (0, extra)) if extra else weight, bias)

    def _extra(self, y: Tensor) -> int:
        """Channels of zeros that the hidden layer is given so that its rows start at multiples of 16 bytes.

        On a GPU products and kernels take a multiple of the time where they don't (EVA-02-L has 2730); the copy of the
        weights is nothing beside them where there are many tokens.
        """
        extra = -self.fc2[0].shape[1] % 8
        return extra if extra and y.shape[0] * y.shape[1] >= MANY_ROWS and backend.takes_kernels(y) else 0

    def _filled(self, layer: Linear, extra: int) -> Linear:
        """A layer of fc1 with as many rows of zeros behind those of gate, and behind those of x."""
        weight, bias = (None if p is None else p.unflatten(0, (2 // len(self.fc1), -1)) for p in layer)
        assert weight is not None
        weight = F.pad(weight, (0, 0, 0, extra)).flatten(0, 1)
        return weight, None if bias is None else F.pad(bias, (0, extra)).flatten(0, 1)


class Mlp(NamedTuple):
    """Such an MLP that is yet to run on y [B, N, C], and to be added to x: ``call`` does both, and the norm behind."""

    y: Tensor
    parts: MlpParts
    call: Callable[..., tuple[Tensor, Tensor]]

    def branch(self) -> Branch:
        """What the MLP adds."""
        return Branch(dropped(self.parts.value(self.y), self.parts.drop), self.parts.gamma)

    def add(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
        """X + gamma * MLP(y) and, where a norm is given, its norm: with it, one call."""
        if norm is None:
            return self.branch().add(x, None)
        return ops.take(self.call, x, self.y, *self.parts[:4], norm[:3], norm.dtype, self.parts.drop)


class Counts:
    """Sizes float32 [B, M], out of the reach of wrappers that cast floating tensors: a half cannot hold counts."""

    def __init__(self, size: Tensor | None) -> None:
        self.size = size


@dataclass(eq=False, repr=False)
class Tokens:
    """The tokens between two blocks.

    To everything but a patched block they are the full grid: indexing, arithmetic, methods and functions of torch see
    the tensor [B, N0, C] in which each original token has the value of the token that it went into.

    Attributes:
        x: [B, M, C], the merged tokens.
        size: float32 [B, M], how many original tokens each stands for; None while nothing has been merged.
        unadded: x without what waits to be added to it.
        slot: int32 [B, N0], where each original token is now; None while nothing has been merged.
        steps: the slot maps of the merges so far, int32 [B, N_i], first to last.
        waiting: an addition to x that its reader computes, together with the norm through which it reads x.
        home: int64 [B, M], the original token in whose place each stands, for blocks that read positions.
        is_padded: some tokens are padding, of size PADDING.
        checkpoint: the reentrant checkpoint that they were made in, which passes no gradients to them.

    """

    # A dataclass, whose tensors wrappers find, as FSDP2 must those that need gradients.
    unadded: Tensor
    counts: Counts | None = None
    steps: tuple[Tensor, ...] = ()
    waiting: Branch | Mlp | None = None
    home: Tensor | None = None
    is_padded: bool = False
    checkpoint: object = None

    @property
    def size(self) -> Tensor | None:
        """How many original tokens each stands for, float32 [B, M]; None while nothing has been merged."""
        return None if self.counts is None else self.counts.size

    @property
    def x(self) -> Tensor:
        """The merged tokens [B, M, C]."""
        return self.added().unadded

    @property
    def slot(self) -> Tensor | None:
        """Where each original token is now: int32 [B, N0]."""
        return ops.follow(self.steps) if self.steps else None

    def count(self) -> int:
        """M, the number of tokens that are left."""
        return self.unadded.shape[1]

    def enter(self, norm: Norm | None) -> tuple[Tokens, Tensor | None]:
        """The same with nothing waiting and, where a norm is given and can be had with the addition, x normed."""
        if self.waiting is None:
            return self, None
        x, y = self.waiting.add(self.unadded, norm)
        return Tokens(x, self.counts, self.steps, None, self.home, self.is_padded, self.checkpoint), y

    def added(self) -> Tokens:
        """The same with nothing waiting."""
        return self.enter(None)[0]

    def after(
        self, x: Tensor, counts: Counts, slot: Tensor | None, waiting: Branch | Mlp | None, is_placed: bool
    ) -> Tokens:
        """What these have become behind a block that merged them along ``slot`` [B, M], if at all."""
        if slot is None:
            return Tokens(x, counts, self.steps, waiting, self.home, self.is_padded, self.checkpoint)
        home = None
        if is_placed:
            valid = self.size >= 1.0 if self.is_padded and self.size is not None else None
            home = ops.homes(slot, x.shape[1], self.home, valid)
        return Tokens(x, counts, (*self.steps, slot), waiting, home, self.is_padded, self.checkpoint)

    def weights(self, by_size: bool) -> Tensor | None:
        """What attention weighs the keys by, float32 [B, M]: their sizes, or only that padding weighs nothing."""
        if by_size or self.size is None:
            return self.size if by_size else None
        return self.size.clamp(max=1.0) if self.is_padded else None

    def matchable(self, keys: Tensor) -> Tensor:
        """Keys [B, H, M, D] of which those of padding match nothing."""
        if not self.is_padded or self.size is None:
            return keys
        return keys.masked_fill((self.size < 1.0)[:, None, :, None], torch.nan)

    def restored(self) -> Tensor:
        """The full grid [B, N0, C]."""
        if not self.steps:
            return self.x
        branch = self.waiting.branch() if isinstance(self.waiting, Mlp) else self.waiting
        value, gamma = (None, None) if branch is None else branch
        return ops.restore(self.unadded, value, self.steps, gamma)

    def leading(self, count: int) -> Tensor:
        """The first ``count`` tokens, which have not merged, [B, count, C]; what waits is computed for them alone."""
        if not isinstance(self.waiting, Mlp):
            return self.x[:, :count]
        return self.waiting._replace(y=self.waiting.y[:, :count]).add(self.unadded[:, :count], UNREAD)[0]

    def complete(self) -> Tokens:
        """The same with x computed and, where nothing has been merged, sizes of one and the identity for a map."""
        x = self.x
        batch, n, _ = x.shape
        size = torch.ones(batch, n, dtype=torch.float32, device=x.device) if self.size is None else self.size
        if self.steps:
            return Tokens(x, Counts(size), (ops.follow(self.steps),))
        identity = torch.arange(n, dtype=torch.int32, device=x.device).expand(batch, n).contiguous()
        return Tokens(x, Counts(size), (identity,))

    def to(self, *args: Any, **kwargs: Any) -> Tokens:
        """As Tensor.to, for the tokens; sizes and maps follow to the device and keep their dtype."""
        x = self.x.to(*args, **kwargs)
        size = None if self.size is None else self.size.to(x.device)
        home = None if self.home is None else self.home.to(x.device)
        steps = tuple(step.to(x.device) for step in self.steps)
        return Tokens(x, Counts(size), steps, None, home, self.is_padded, self.checkpoint)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):  # a compiled checkpoint: its block takes them as they are
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = restored((args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # looked up by copy and pickle on what is not built yet
            raise AttributeError(name)
        return getattr(self.restored(), name)

    def __repr__(self) -> str:
        return (
            f"Tokens({self.count()} of {self.steps[0].shape[1] if self.steps else self.count()}: {self.unadded.dtype})"
        )


def _as_tensor(name: str) -> Callable[..., Any]:
    def operator(self: Tokens, *args: Any) -> Any:
        return getattr(self.restored(), name)(*restored(args))

    return operator


OPERATORS = "getitem len iter add radd sub rsub mul rmul truediv rtruediv neg abs pow matmul rmatmul"
for _name in OPERATORS.split():
    setattr(Tokens, f"__{_name}__", _as_tensor(f"__{_name}__"))


def restored(tree: Any) -> Any:
    """The same lists, tuples and dictionaries with the full grid in the place of every Tokens."""
    return _pytree.tree_map(
        lambda leaf: leaf.restored() if isinstance(leaf, Tokens) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, Tokens),
    )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.kept: list[Tokens] | None = None
        self.reader: object = None
        self.is_entered = False


_thread = _Thread()


@contextmanager
def kept() -> Iterator[list[Tokens]]:
    """Collect the tokens of this thread's passes before their last block restores the grid."""
    outer, _thread.kept = _thread.kept, []
    try:
        yield _thread.kept
    finally:
        _thread.kept = outer


def keep(tokens: Tokens) -> None:
    """Give the tokens to :func:`kept`, if anyone collects them."""
    if _thread.kept is not None:
        _thread.kept.append(tokens)


@contextmanager
def read_by(model: object) -> Iterator[None]:
    """Tell the last block that, in this thread, this model's forward reads what it gives."""
    outer = _thread.reader, _thread.is_entered
    _thread.reader, _thread.is_entered = model, False
    try:
        yield
    finally:
        _thread.reader, _thread.is_entered = outer


def enter_first() -> None:
    """Note that tokens enter the first block: for the second time in a forward they are a hook's, read by who knows."""
    if _thread.reader is None:  # Nothing is noted in a compiled checkpoint, which allows of no such effect.
        return
    if _thread.is_entered:
        _thread.reader = None
    _thread.is_entered = True


def reader() -> Any:
    """The model whose forward reads what the last block gives, None where it may be anyone: asked once a forward."""
    model = _thread.reader
    if model is not None:
        _thread.reader = None
    return model


def reentrant() -> object:
    """The innermost autograd function, such as a reentrant checkpoint, whose forward pass this is in; None if none."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_varnames else None
        if isinstance(first, FunctionCtx):
            return first
        frame = frame.f_back
    return None


def padded(x: Tensor, valid: Tensor | None, checkpoint: object) -> Tokens:
    """Tokens [B, N, C] that have not merged yet, of which some are padding: ``valid`` bool [B, N] is false there."""
    counts = None if valid is None else Counts(torch.where(valid, 1.0, PADDING).float())
    return Tokens(x, counts, is_padded=valid is not None, checkpoint=checkpoint)


def add(
    x: Tensor, branch: Branch, slot: Tensor | None, tokens: int, size: Tensor | None, norm: Norm | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """X + branch, merged along ``slot`` if there is one, and its norm if there is one: x, y, size."""
    value, gamma = branch
    if norm is not None and (value.dtype is x.dtype or x.dtype is torch.float32):
        return ops.merge_add_norm(x, value, slot, tokens, size, norm.weight, norm.bias, norm.eps, gamma, norm.dtype)
    value, skip = value if gamma is None else value * gamma, x.shape[1] - value.shape[1]
    x = x + (F.pad(value, (0, 0, skip, 0)) if skip else value)
    if slot is not None:
        x, size = ops.merge(x, slot, tokens, size)
    return x, None, size


# Wrappers look for tensors among arguments and results, and may cast the floating ones. Sizes are counts that a
# half cannot hold, so they pass as the integers of the same bits.


def _flatten(tokens: Tokens) -> tuple[list[Tensor | None], tuple[bool, object]]:
    if isinstance(tokens.waiting, Mlp):
        tokens = tokens.added()
    waiting = tokens.waiting
    value, gamma = waiting if isinstance(waiting, Branch) else (None, None)
    size = None if tokens.size is None else tokens.size.view(torch.int32)
    return [tokens.unadded, value, gamma, size, tokens.home, *tokens.steps], (tokens.is_padded, tokens.checkpoint)


def _unflatten(values: Iterable[Any], others: tuple[bool, object]) -> Tokens:
    x, value, gamma, size, home, *steps = values
    if isinstance(size, Tensor):
        size = size.view(torch.float32)
    return Tokens(x, Counts(size), tuple(steps), None if value is None else Branch(value, gamma), home, *others)


_pytree.register_pytree_node(Tokens, _flatten, _unflatten, serialized_type_name="tome.Tokens")
