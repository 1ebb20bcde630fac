"""The kinds of layer that can be adapted, and the search for them. One file per kind, one line in KINDS.

A module belongs to a kind if its type is exactly one of the kind's types, or if a trial shows that it computes the
same. A subclass need not: it may scale its output, or its parent may read the weight without calling it.
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
    """The kind that handles a weight of a module.

    Args:
        module: The module that holds the weight.
        parameter: The name of the weight in the module.

    Returns:
        The kind's key in KINDS, or None if no kind handles this weight.
    """
    return next((name for name in kinds_of(module) if (name.partition(".")[2] or "weight") == parameter), None)


def kinds_of(module: nn.Module) -> list[str]:
    """The kinds of a module's weights, as keys in KINDS: one kind for each weight that can be adapted."""
    exact = _BY_TYPE.get(type(module))
    return [exact] if exact else [name for name, kind in KINDS.items() if kind.computes_as(module)]


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every weight of a known kind below the model, as sites in the order of its modules."""
    found = []
    for path, module in model.named_modules():
        for name in kinds_of(module) if path else ():
            kind, (_, dot, parameter) = KINDS[name], name.partition(".")
            found.append(Site(path + dot + parameter, name, *kind.widths(module), kind.form(module)))
    return tuple(found)


__all__ = ["KINDS", "Kind", "find_sites", "kind_of"]
