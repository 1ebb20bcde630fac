"""Module kinds that can be adapted, and how to find them. One file per kind, one line in KINDS.

Types are matched exactly, or a kind tries out what a module computes: a subclass may scale what it gives, or be read
past its own forward.
"""

from __future__ import annotations

from torch import nn

from lorafit.layers import conv1d, embedding, linear
from lorafit.layers.kind import Kind
from lorafit.layers.site import Site

KINDS: dict[str, Kind] = {"linear": linear.KIND, "conv1d": conv1d.KIND, "embedding": embedding.KIND}

_BY_TYPE = {module_type: name for name, kind in KINDS.items() for module_type in kind.types}


def kind_of(module: nn.Module) -> str | None:
    """Name of the kind that handles this module, or None."""
    exact = _BY_TYPE.get(type(module))
    return exact or next((name for name, kind in KINDS.items() if kind.computes_as(module)), None)


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every module of a known kind, in the order of the model."""
    found = []
    for path, module in model.named_modules():
        name = kind_of(module)
        if name is not None and path:
            found.append(Site(path, name, *KINDS[name].widths(module)))
    return tuple(found)


__all__ = ["KINDS", "Kind", "find_sites", "kind_of"]
