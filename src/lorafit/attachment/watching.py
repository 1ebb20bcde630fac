"""What reaches the sites of a base when it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorafit.attachment.blocks import shadowed
from lorafit.attachment.fused import layer_by_layer
from lorafit.bases.base import Base

Forward = Callable[[], object]


T = TypeVar("T")


def fired(base: Base, forward: Forward) -> frozenset[str]:
    """Paths of the sites that take part when `forward()` runs the base, e.g. on the user's rows: those that `attach`
    reaches, for they are found as it finds them."""
    seen: set[str] = set()

    def seeing(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            seen.add(path)
            return original(*given, **named)

        return forward

    with ExitStack() as held, torch.no_grad():
        held.enter_context(layer_by_layer(base))
        for site in base.sites:
            module = base.model.get_submodule(site.path)
            held.enter_context(shadowed([module], seeing(site.path, module.forward)))
        forward()
    return frozenset(seen)


@contextmanager
def observing(
    base: Base, paths: Iterable[str], keep: Callable[[str, Tensor], T], see: Callable[[str, T, Tensor], None]
) -> Iterator[None]:  # fmt: skip
    """Watch these sites in every forward and backward inside. Goes inside `attach`.

    Args:
        base: the base whose sites are watched.
        paths: paths of the sites.
        keep: called in the forward with the path and x (tokens, d_in), what the site was given. Only what it returns is
            held until the backward, so where blocks are computed twice the inputs need not be held.
        see: called in the backward with the path, what `keep` returned, and g (tokens, d_out), the gradient at what
            came out of the site.
    """

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            kept = keep(path, given[0].detach().flatten(0, -2))
            output.register_hook(lambda g: see(path, kept, g.flatten(0, -2)))

        return seen

    handles = [base.model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
