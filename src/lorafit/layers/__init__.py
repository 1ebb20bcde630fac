"""Module kinds that can be adapted, and how to find them. One file per kind, one line in KINDS.

Types are matched exactly, or a kind tries out what a module computes: a subclass may scale what it gives, or be read
past its own forward.
"""

from __future__ import annotations

from torch import nn

from lorafit.layers import attention, conv1d, convolution, embedding, experts, linear
from lorafit.layers.kind import Kind
from lorafit.layers.site import Site

KINDS: dict[str, Kind] = {
    "linear": linear.KIND,
    "conv1d": conv1d.KIND,
    "embedding": embedding.KIND,
    "convolution": convolution.KIND,
    **attention.KINDS,
    **experts.KINDS,
}

_BY_TYPE = {module_type: name for name, kind in KINDS.items() for module_type in kind.types}


def kind_of(module: nn.Module, parameter: str = "weight") -> str | None:
    """Name of the kind that handles this module's weight of this name, or None."""
    return next((name for name in kinds_of(module) if (name.partition(".")[2] or "weight") == parameter), None)


def kinds_of(module: nn.Module) -> list[str]:
    """Names of the kinds of its weights, none twice."""
    exact = _BY_TYPE.get(type(module))
    return [exact] if exact else [name for name, kind in KINDS.items() if kind.computes_as(module)]


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every weight of a known kind, in the order of the model."""
    found = []
    for path, module in model.named_modules():
        for name in kinds_of(module) if path else ():
            kind, (_, dot, parameter) = KINDS[name], name.partition(".")
            found.append(Site(path + dot + parameter, name, *kind.widths(module), kind.form(module)))
    return tuple(found)


__all__ = ["KINDS", "Kind", "find_sites", "kind_of"]
