"""The mutable state of training: one flat fp32 master vector with all trained factors of an adapter."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorafit.adapters.adapter import Adapter, cast, computed, parameters_of


class TrainState:
    """The factors of an adapter in training, to be attached in place of an Adapter.

    `master`, (n,) fp32, is the only parameter: any optimizer can step it, and its gradient accumulates in fp32 however
    a step is divided. Matrices come first, vectors (DoRA's magnitudes) last. Each forward pass computes with views of a
    copy in its own dtype, through which autograd carries their gradient back. `freeze()` copies it into an Adapter.

    Args:
        adapter: where training starts.
        device: of `master`; None for the CPU.
        dropout: the share of inputs dropped while `training` is True. Set that to False to evaluate: `model.eval()`
            does not, since the factors are not the model's.
    """

    def __init__(self, adapter: Adapter, device: torch.device | None = None, dropout: float = 0.0):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} cannot be: choose 0 up to, not including, 1")
        self._start = adapter
        self.dropout = dropout
        self.training = True
        self.groups: dict[str, list[str]] = {}  # of `attachment.Source`
        declared = adapter.plan.tensors()
        items = [(path, name, shape) for path, name, shape, trained in declared if trained]
        device = device or torch.device("cpu")
        frozen = [f"{path}.{name}" for path, name, _, trained in declared if not trained]
        self._frozen = {key: adapter.tensors[key].to(device, torch.float32) for key in frozen}
        self._layout = sorted(items, key=lambda item: len(item[2]) == 1)  # stable: matrices, then vectors
        flat = torch.cat([adapter.tensors[f"{path}.{name}"].reshape(-1) for path, name, _ in self._layout])
        self.matrices = sum(math.prod(shape) for _, _, shape in self._layout if len(shape) > 1)
        self.master = nn.Parameter(flat.to(device, torch.float32))
        self._views: dict[str, dict[str, Tensor]] = {}
        self._made_for: tuple[object, ...] | None = None
        _forget_after_steps(self)
        alive = weakref.ref(self)
        self.master.register_post_accumulate_grad_hook(lambda _: _forget(alive))

    @property
    def adapter(self) -> Adapter:
        """The adapter training started from: its plan, base and rendering are this state's."""
        return self._start

    def parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer."""
        return [self.master]

    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """Views by site path and factor name, made once per optimizer step, grad mode, dtype and device.

        The version counter of `master` shows that it has been written to. Two writers do not change the counter (torch
        2.13): fused optimizers, which `_forget_after_steps` notices, and `master.data -= ...` in a user's own loop,
        which follows a backward pass, after which the views are made again too.
        """
        key = (self.master._version, torch.is_grad_enabled(), dtype, device)
        if key != self._made_for:
            self._views = self._make_views(dtype, device)
            self._made_for = key
        return self._views

    def _make_views(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        if self._frozen:  # such methods derive their tensors in fp32, slot by slot
            named = {**self._frozen, **self._named(self.master)}
            plan = self._start.plan
            return {slot.site.path: computed(slot, named, dtype, device) for slot in plan.slots} | {
                module.path: parameters_of(module, named, dtype, device) for module in plan.whole
            }
        matrices, vectors = self.master.split([self.matrices, self.master.numel() - self.matrices])
        flat = {True: cast(matrices[None], dtype, device)[0], False: vectors.to(device)}
        views: dict[str, dict[str, Tensor]] = {}
        for is_matrix, whole in flat.items():
            items = [item for item in self._layout if (len(item[2]) > 1) == is_matrix]
            parts = whole.split([math.prod(shape) for _, _, shape in items]) if items else ()
            for (path, name, shape), part in zip(items, parts, strict=True):
                views.setdefault(path, {})[name] = part.view(shape)
        for module in self._start.plan.whole:  # a module computes in one dtype, its vectors too
            views[module.path] = {name: tensor.to(dtype) for name, tensor in views[module.path].items()}
        return views

    def drop(self, x: Tensor) -> Tensor:
        """Drop inputs of the pair; the base's own path gets all of x."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of trained factors by `<site path>.<factor>`, views of `master.grad`; empty before a backward."""
        return {} if self.master.grad is None else self._named(self.master.grad)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([math.prod(shape) for _, _, shape in self._layout])
        return {
            f"{path}.{name}": part.view(shape) for (path, name, shape), part in zip(self._layout, parts, strict=True)
        }

    def freeze(self) -> Adapter:
        """A copy as an Adapter, which later steps do not change."""
        start = self._start
        tensors = {**self._frozen, **self._named(self.master.detach())}
        return Adapter(start.plan, tensors, start.base, start.base_name, start.rendering, classes=start.classes)

    def load(self, flat: Tensor) -> None:
        """Overwrite every trained factor with a vector saved from `master`."""
        with torch.no_grad():
            self.master.copy_(flat)


def _forget(alive: weakref.ref[TrainState]) -> None:
    if (state := alive()) is not None:
        state._made_for = None


def _forget_after_steps(state: TrainState) -> None:
    """Have `state` make its views again after every step of a torch optimizer that steps it."""
    alive = weakref.ref(state)

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        state = alive()
        if state is not None and any(p is state.master for group in optimizer.param_groups for p in group["params"]):
            state._made_for = None

    weakref.finalize(state, register_optimizer_step_post_hook(stepped).remove)
