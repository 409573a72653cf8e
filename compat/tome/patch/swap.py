"""Giving a module another class, and taking it back: what every patch is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

M = TypeVar("M")

if TYPE_CHECKING:
    _Module = nn.Module  # what the class is that a mixin goes into
else:
    _Module = object


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not understood; the message names the part and the reason."""


class Patched(_Module):
    """Mixed into the class of a module. The new class has the old one's name, which wrappers and hubs go by."""

    _tome_base: type[nn.Module]
    _tome_transient: tuple[str, ...] = ()  # attributes that copies and pickles leave out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name a class that has no name of its own by what it is made of."""
        made_of = vars(type(self)).get("_tome_made_of")
        reduced: Any = super().__reduce_ex__(protocol)
        return reduced if made_of is None else (_new, made_of, *reduced[2:])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._tome_transient}


def swap(module: nn.Module, mixin: type[Patched]) -> None:
    """Mix ``mixin`` into a module's class; a module that has it already is left alone."""
    if not isinstance(module, mixin):
        module.__class__ = _class(mixin, type(module))


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was patched."""
    base: type[nn.Module] = getattr(module, "_tome_base", type(module))
    return base


def parts_of(model: object) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model, or of the models of a pipeline, which is none itself, by their names."""
    if isinstance(model, nn.Module):
        yield from model.named_modules()
        return
    for name, part in vars(model).items():
        if isinstance(part, nn.Module):
            yield from part.named_modules(prefix=name)


def unpatch(model: M) -> M:
    """Undo a patch: every module gets its class back, and no attribute is left behind. Returns the model.

    Args:
        model: a model, or a pipeline of diffusers.

    Raises:
        UnsupportedModelError: another library has changed the class since (``fully_shard`` does).

    """
    patched = [(name, module) for name, module in parts_of(model) if isinstance(module, Patched)]
    for name, module in patched:
        check_own(name, module)
    for _, module in patched:
        module.__class__ = module._tome_base  # type: ignore[assignment]
        for name in [n for n in vars(module) if n.startswith("_tome")]:
            delattr(module, name)
    return model


def check_own(name: str, module: nn.Module) -> None:
    """Refuse a patched module whose class has been changed on top."""
    if isinstance(module, Patched) and "_tome_base" not in vars(type(module)):
        raise UnsupportedModelError(
            f"{name or 'the model'}: its class was changed after it was patched, to {type(module).__name__} (as "
            "fully_shard does); patch and unpatch before that"
        )


def check_block(name: str, block: nn.Module) -> None:
    """Refuse a block whose new class would not be called, or that :func:`check_own` refuses."""
    check_own(name, block)
    if "forward" in vars(block):
        raise UnsupportedModelError(
            f"{name}: its forward was replaced (as accelerate's hooks for offloading do), so that a patch would not be "
            "called; patch before that"
        )


def name_of(kind: type, home: str = "") -> str:
    """A class by its module and name, without what it begins with where that is ``home``."""
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix(home)


def check_parts(name: str, module: nn.Module, known: Collection[str]) -> None:
    """Refuse a module with children of other names."""
    unknown = sorted({child for child, _ in module.named_children()} - set(known))
    if unknown:
        raise UnsupportedModelError(f"{name}: {type(module).__name__} has parts that are not understood: {unknown}")


_made: dict[tuple[type[Patched], type[nn.Module]], type[nn.Module]] = {}


def _class(mixin: type[Patched], base: type[nn.Module]) -> type[nn.Module]:
    if (mixin, base) not in _made:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        own = {"_tome_base": base, "_tome_made_of": (mixin, base)}
        _made[mixin, base] = type(base.__name__, (mixin, base), {**names, **own})
    return _made[mixin, base]


def _new(mixin: type[Patched], base: type[nn.Module]) -> nn.Module:
    kind = _class(mixin, base)
    return kind.__new__(kind)
