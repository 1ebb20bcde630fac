"""Observes the sites of a base while it runs: which ones take part, and their inputs and gradients."""

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
    """The sites at which an adapter can learn: those that the forward calls, and that receive a gradient.

    A layer receives none if the model runs it without gradient, as sparse attention does with the layer that chooses
    its tokens. No backward is computed: the function follows the graph and keeps no activations.

    Args:
        base: The base.
        forward: Runs the base, for example on the user's rows, and returns the tensor that would be trained.

    Returns:
        The paths of the sites.
    """
    path_of: dict[Node, str] = {}

    def watched(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            returned = original(*given, **named)
            output, *others = returned if isinstance(returned, tuple) else (returned,)  # attention returns its weights
            if torch.is_grad_enabled():
                if not output.requires_grad:  # the base is frozen, and nothing before this site needs a gradient
                    output = output.detach().requires_grad_()
                output = output.clone()  # its node stays in the graph after an in-place change, unlike that of a view
                assert output.grad_fn is not None
                path_of[output.grad_fn] = path
            return (output, *others) if isinstance(returned, tuple) else output

        return forward

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(saved_tensors_hooks(lambda tensor: None, lambda kept: kept))
        stack.enter_context(layer_by_layer(base))
        stack.enter_context(unwritten(base))
        for path in dict.fromkeys(site.module for site in base.every_site):
            module = base.model.get_submodule(path)
            stack.enter_context(shadowed([module], watched(path, module.forward)))
        ancestors = _ancestors(forward())
    reached = {path for node, path in path_of.items() if node in ancestors}
    return frozenset(site.path for site in base.every_site if site.module in reached)


def _ancestors(output: Tensor) -> set[Node]:
    """Every node of the graph that a backward of `output` reaches."""
    found: set[Node] = set()
    to_visit = [output.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is not None and node not in found:
            found.add(node)
            to_visit += [before for before, _ in node.next_functions]
    return found


@contextmanager
def observing(
    base: Base, paths: Iterable[str], keep: Callable[[str, Tensor], T], see: Callable[[str, T, Tensor], None]
) -> Iterator[None]:
    """Observe these sites in every forward and backward inside the block. Enter it inside `attach`. A site that runs
    without gradient is not observed.

    Args:
        base: The base.
        paths: The paths of the sites.
        keep: Called in the forward with the path and the site's input x (tokens, d_in). Only its result is held until
            the backward, so inputs need not be held if blocks are recomputed.
        see: Called in the backward with the path, the result of `keep`, and the gradient g (tokens, d_out) of the
            site's output.
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
