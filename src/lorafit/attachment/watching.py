"""What reaches the sites of a base when it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from lorafit.attachment.blocks import shadowed
from lorafit.attachment.buffers import unwritten
from lorafit.attachment.fused import layer_by_layer
from lorafit.bases.base import Base

T = TypeVar("T")


def fired(base: Base, forward: Callable[[], Tensor]) -> frozenset[str]:
    """Paths of the sites that an adapter can learn at: `forward()`, which runs the base, e.g. on the user's rows, and
    returns what is trained, calls them as `attach` has them called, and a gradient of it comes back to them. None comes
    back to a layer that the model runs without gradient, as sparse attention does with what chooses its tokens.

    The graph is walked, not computed: nothing that a backward would need is kept.
    """
    made_by: dict[Node, str] = {}

    def watched(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            made = original(*given, **named)
            output, *others = made if isinstance(made, tuple) else (made,)  # attention gives its weights too
            if torch.is_grad_enabled():
                if not output.requires_grad:  # the base is frozen, and nothing before this site wants a gradient
                    output = output.detach().requires_grad_()
                output = output.clone()  # whose step stays in the graph if it is written to, as that of a view does not
                assert output.grad_fn is not None
                made_by[output.grad_fn] = path
            return (output, *others) if isinstance(made, tuple) else output

        return forward

    with ExitStack() as held, torch.enable_grad():
        held.enter_context(saved_tensors_hooks(lambda tensor: None, lambda kept: kept))
        held.enter_context(layer_by_layer(base))
        held.enter_context(unwritten(base))
        for path in dict.fromkeys(site.module for site in base.every_site):
            module = base.model.get_submodule(path)
            held.enter_context(shadowed([module], watched(path, module.forward)))
        behind = _behind(forward())
    reached = {path for node, path in made_by.items() if node in behind}
    return frozenset(site.path for site in base.every_site if site.module in reached)


def _behind(output: Tensor) -> set[Node]:
    """Every step of the graph that a gradient of `output` comes back to."""
    found: set[Node] = set()
    ahead = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions]
    return found


@contextmanager
def observing(
    base: Base, paths: Iterable[str], keep: Callable[[str, Tensor], T], see: Callable[[str, T, Tensor], None]
) -> Iterator[None]:
    """Watch these sites in every forward and backward inside. Goes inside `attach`. A site that is run without gradient
    is not seen.

    Args:
        base: the base whose sites are watched.
        paths: paths of the sites.
        keep: called in the forward with the path and x (tokens, d_in), what the site was given. Only what it returns is
            held until the backward, so where blocks are computed twice the inputs need not be held.
        see: called in the backward with the path, what `keep` returned, and g (tokens, d_out), the gradient at what
            came out of the site.
    """

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def seen(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            if output.requires_grad:
                (x,) = (*given, *named.values())
                kept = keep(path, x.detach().flatten(0, -2))
                output.register_hook(lambda g: see(path, kept, g.flatten(0, -2)))

        return seen

    handles = [base.model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
