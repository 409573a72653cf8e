"""Which parts of a block do what their types say and are watched by nobody, so that they need not be called.

What a part computes with is read off it once, with :class:`Reading`, and read again when anything has changed since.
A library's own types join the tables here when its file in this folder is imported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tome.recording import record
from tome.tokens import Branch, GatedParts, Linear, MlpParts, Norm

Kinds = dict[type[nn.Module], Any]

NORMS: Kinds = {nn.LayerNorm: False}  # does it return the dtype that it is given, under autocast too?
LINEARS: Kinds = {nn.Linear: None}
STOCHASTIC_DEPTH = "drop_prob"  # as libraries call its rate
INERT_IN_EVAL: Kinds = {nn.Identity: None, nn.Dropout: "p"}  # in training too where their rate, by its name, is 0
GELUS: dict[type[nn.Module], Callable[[Any], str]] = {  # which: "erf", "tanh" or "quick"
    nn.GELU: lambda gelu: "tanh" if gelu.approximate == "tanh" else "erf"
}
SILUS: Kinds = {nn.SiLU: None}
GATED: dict[type[nn.Module], Callable[[Reading, Any], GatedParts]] = {}  # MLPs of silu(gate) * x, and how to read one
SCALES: dict[type[nn.Module], str | None] = {nn.Identity: None}  # LayerScale: the name of its factor
# Forward hooks that a library leaves behind, by module and qualified name: whether one does anything in this pass.
RECORDERS: dict[tuple[str, str], Callable[[Any], bool]] = {}
PLAIN_VALUES = (nn.Parameter, Tensor, type(None))  # of a quantised or distributed layer the weight is a subclass


class NotPlain(Exception):  # noqa: N818  # no error
    """The part must be called; the message says why."""


class AttentionParts(NamedTuple):
    """What attention computes with where it ends in a linear layer."""

    qkv: Linear | None  # None: q, k, v need more than one linear layer
    proj: Linear
    gamma: Tensor | None = None  # of the LayerScale behind it


class Plan(NamedTuple):
    """What a block computes with where nobody watches; a sentence where parts must be called, and why."""

    attention: AttentionParts | str
    mlp: MlpParts | GatedParts | str
    norms: tuple[Norm, Norm] | str
    drops: tuple[nn.Module | None, nn.Module | None]  # stochastic depth of the two branches, where it drops any
    calls: dict[Any, dict[str, Callable[..., Any]]]  # the halves that can be one call, by the kind of tokens


class Reading:
    """Reads what modules compute with, and remembers what it has seen.

    Raises:
        NotPlain: a part that must be called; raised by every method but ``holds``.

    """

    def __init__(self, root: Any) -> None:
        self._root = root._modules
        # Entry i: the value that the owner, a dictionary of a module, has by that name.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._modules: list[nn.Module] = []
        self._kinds: list[type] = []
        self._lengths: list[tuple[dict[str, Any], int]] = []

    def holds(self, root: Any) -> bool:
        """Whether everything that was read of ``root`` is still as it was (and root no replica of it)."""
        # By map, in less of the host's time: every block asks this in every pass.
        if (
            root._modules is not self._root
            or not all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            or not all(map(operator.is_, map(type, self._modules), self._kinds))
            or [owner for owner, length in self._lengths if len(owner) != length]
        ):
            return False
        for module in self._modules:  # as has_hooks
            own = module.__dict__
            if (
                (own["_forward_hooks"] and are_awake(own["_forward_hooks"]))
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return False
        return True

    def _keep(self, owner: dict[str, Any], name: str, value: object) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(value)

    def unwatched(self, owner: Any, name: str) -> Any:
        """The child of that name, of whatever type, which nobody watches."""
        child = owner._modules[name]
        return self.part(owner, name, {type(child): None})

    def part(self, owner: Any, name: str, kinds: Kinds) -> Any:
        """The child of that name, which must be of one of these types and unwatched."""
        child = owner._modules.get(name)
        self._keep(owner._modules, name, child)
        if child is not None:
            self._modules.append(child)
            self._kinds.append(type(child))
            self._keep(child.__dict__, "training", child.training)
        if child is None or type(child) not in kinds:
            raise NotPlain(f"{name} is a {type(child).__name__}")
        if has_hooks(child):
            raise NotPlain(f"{name} has hooks or a forward of its own")
        return child

    def norm(self, owner: Any, name: str) -> Norm:
        """A LayerNorm over the last dimension."""
        child = self.part(owner, name, NORMS)
        weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
        self._keep(child._parameters, "weight", weight)
        self._keep(child._parameters, "bias", bias)
        self._keep(child.__dict__, "eps", child.__dict__.get("eps"))
        found = norm(name, child, None)
        if found is None:
            raise NotPlain(f"{name} is not plain")
        return found

    def inert(self, owner: Any, *names: str) -> None:
        """Children that return what they are given, or are not there."""
        for name in names:
            if not self._is_missing(owner, name) and self._rate(self.part(owner, name, INERT_IN_EVAL)):
                raise NotPlain(f"{name} drops in training")

    def drop(self, owner: Any, name: str | None) -> nn.Module | None:
        """The stochastic depth of a branch, if it drops any now."""
        if name is None or self._is_missing(owner, name):
            return None
        child: nn.Module = self.part(owner, name, INERT_IN_EVAL)
        if not self._rate(child):
            return None
        if INERT_IN_EVAL[type(child)] != STOCHASTIC_DEPTH:
            raise NotPlain(f"{name} drops in training")
        return child

    def _is_missing(self, owner: Any, name: str) -> bool:
        is_missing = owner._modules.get(name) is None
        if is_missing:
            self._keep(owner._modules, name, None)
        return is_missing

    def _rate(self, child: nn.Module) -> float:
        rate = INERT_IN_EVAL[type(child)]
        if rate is None or not child.training:
            return 0.0
        value: float = getattr(child, rate)
        self._keep(child.__dict__, rate, value)
        return value

    def linear(self, owner: Any, name: str) -> Linear:
        """Weight and bias of a child."""
        return self.affine(self.part(owner, name, LINEARS), "weight", "bias")

    def affine(self, module: nn.Module, weight: str, bias: str) -> Linear:
        """Weight and bias of a module, by the names of its parameters."""
        self._keep(module._parameters, bias, module._parameters.get(bias))
        return self.parameter(module, weight), module._parameters[bias]

    def steps(self, sequence: Any) -> list[str]:
        """The names of a Sequential's parts, without those that return what they are given."""
        self._lengths.append((sequence._modules, len(sequence._modules)))
        inert = {name for name, part in sequence._modules.items() if type(part) in INERT_IN_EVAL}
        self.inert(sequence, *inert)
        return [name for name in sequence._modules if name not in inert]

    def gamma(self, owner: Any, scale: str | None) -> Tensor | None:
        """The factor of a LayerScale, or None where there is none."""
        if scale is None:
            return None
        for own in (owner._parameters, owner.__dict__):  # of blocks that keep no module for it
            if scale in own:
                self._keep(own, scale, own[scale])
                return None if own[scale] is None else self.parameter(owner, scale)
        child = self.part(owner, scale, SCALES)
        factor = SCALES[type(child)]
        return None if factor is None else self.parameter(child, factor)

    def gelu(self, owner: Any, name: str) -> str:
        """Which GELU a child is."""
        child = self.part(owner, name, GELUS)
        self._keep(child.__dict__, "approximate", child.__dict__.get("approximate"))
        return GELUS[type(child)](child)

    def parameter(self, module: nn.Module, name: str) -> Tensor:
        """A parameter of a module; a replica of DataParallel has none."""
        value = module._parameters.get(name)
        if type(value) is not nn.Parameter or value.layout is not torch.strided:
            kind = value.layout if type(value) is nn.Parameter else type(value).__name__
            raise NotPlain(f"a weight is a {kind}")
        self._keep(module._parameters, name, value)
        return value


def norm(name: str, module: Any, dtype: torch.dtype | None) -> Norm | None:
    """A LayerNorm over the last dimension that may be computed outside of its module; None, and recorded, if not."""
    if type(module) not in NORMS:
        reason = f"{name} is a {type(module).__name__} and no plain LayerNorm"
    elif len(module.normalized_shape) != 1:
        reason = f"{name} is over {len(module.normalized_shape)} dimensions"
    elif has_hooks(module):
        reason = f"{name} has hooks or a forward of its own"
    else:
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or bias is None:  # not in a replica of DataParallel, and where there are none
            weight, bias = module.weight, module.bias
        if type(weight) in PLAIN_VALUES and type(bias) in PLAIN_VALUES:
            return Norm(weight, bias, module.eps, dtype)
        reason = f"the weight of {name} is a {type(weight).__name__}"
    record("merge_add_norm", None, reason)
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds to on the tokens' type of device, where it is on."""
    device = "cuda" if x.is_cuda else x.device.type  # the latter takes the host longer
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def through(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output; a call costs microseconds, which count where a block takes a hundred."""
    return x if is_inert(module) else module(x)


def scaled(block: Any, value: Tensor, scale: str | None, drop: str | None) -> Branch:
    """The branch behind LayerScale and drop path; a plain LayerScale is left to the addition."""
    factor: Any = None if scale is None else getattr(block, scale)
    path: Any = None if drop is None else getattr(block, drop)
    name = SCALES.get(type(factor))
    if name is not None and not has_hooks(factor):
        factor = getattr(factor, name)
    if isinstance(factor, Tensor):
        if path is None or is_inert(path):
            return Branch(value, factor)
        value, factor = value * factor, None
    for part in (factor, path):
        value = value if part is None else through(part, value)
    return Branch(value)


def is_inert(module: nn.Module) -> bool:
    """Whether the module returns what it is given."""
    kind = type(module)
    return (kind is nn.Identity or (kind in INERT_IN_EVAL and not module.training)) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or replaces calls of the module, so that it has to be called."""
    return bool(
        (module._forward_hooks and are_awake(module._forward_hooks))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced for this instance, as accelerate does
    )


def are_awake(hooks: Mapping[int, Any]) -> bool:
    """Whether any of a module's forward hooks may do something in this pass."""
    # With gradients all of them count: a checkpoint must take the same way again when nobody records any more.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    for hook in hooks.values():
        records = RECORDERS.get((getattr(hook, "__module__", ""), getattr(hook, "__qualname__", "")))
        if records is None or records(hook):
            return True
    return False


def why_watched(x: Tensor) -> str | None:
    """Who sees or asks for more than the result, so that parts have to be called one by one; None if nobody does."""
    if torch.compiler.is_compiling():  # which takes the same way, and could not read what follows
        return None
    if type(x) is not Tensor:
        return f"the tokens are a {type(x).__name__}"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode sees each operation"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func sees each operation"
    return "there are global module hooks" if _has_any_global_hook() else None
