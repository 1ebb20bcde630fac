"""The mutable state of training: one flat fp32 master vector that holds every factor that is trained."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorafit.adapters.adapter import Adapter, cast, computed


class TrainState:
    """Factors of one adapter, those trainable that its method trains.

    `master` (n,) fp32 is the only parameter: any optimizer can step it, and its gradient accumulates in fp32
    however a step is divided. Matrices lie first, vectors (DoRA's magnitudes) last. Each forward computes with
    views of a copy in its own dtype; autograd carries their gradient back through that copy.

    A TrainState is what `attach` takes in place of an Adapter. `freeze()` copies it into an Adapter. Dropout acts while
    `training` is True; set it to False to evaluate (`model.eval()` does not reach it: the factors are not the model's).
    """

    def __init__(self, adapter: Adapter, device: torch.device | None = None, dropout: float = 0.0):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} cannot be: choose 0 up to, not including, 1")
        self._start = adapter
        self.dropout = dropout
        self.training = True
        declared = [(slot.site.path, *item) for slot in adapter.plan.slots for item in slot.factors().items()]
        items = [(path, name, factor.shape) for path, name, factor in declared if factor.trained]
        device = device or torch.device("cpu")
        frozen = [f"{path}.{name}" for path, name, factor in declared if not factor.trained]
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
        """What an optimizer steps."""
        return [self.master]

    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """Views by site path and factor name, made once per optimizer step, grad mode, dtype and device.

        The version counter of `master` tells when it has been written to. Two writers leave the counter as it is
        (torch 2.13): fused optimizers, which `_forget_after_steps` notices, and `master.data -= ...` in a loop of one's
        own, which follows a backward, after which the views are made anew too.
        """
        key = (self.master._version, torch.is_grad_enabled(), dtype, device)
        if key != self._made_for:
            self._views = self._make_views(dtype, device)
            self._made_for = key
        return self._views

    def _make_views(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        if self._frozen:  # what such methods compute with is made in fp32, slot by slot
            named = {**self._frozen, **self._named(self.master)}
            return {slot.site.path: computed(slot, named, dtype, device) for slot in self._start.plan.slots}
        matrices, vectors = self.master.split([self.matrices, self.master.numel() - self.matrices])
        flat = {True: cast(matrices[None], dtype, device)[0], False: vectors.to(device)}
        views: dict[str, dict[str, Tensor]] = {}
        for is_matrix, whole in flat.items():
            items = [item for item in self._layout if (len(item[2]) > 1) == is_matrix]
            parts = whole.split([math.prod(shape) for _, _, shape in items]) if items else ()
            for (path, name, shape), part in zip(items, parts, strict=True):
                views.setdefault(path, {})[name] = part.view(shape)
        return views

    def drop(self, x: Tensor) -> Tensor:
        """Adapter dropout: on the input of the pair only, the base's own path sees all of x."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by `<site path>.<factor>` of what is trained: views of `master.grad`; empty before a backward."""
        return {} if self.master.grad is None else self._named(self.master.grad)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([math.prod(shape) for _, _, shape in self._layout])
        return {
            f"{path}.{name}": part.view(shape) for (path, name, shape), part in zip(self._layout, parts, strict=True)
        }

    def freeze(self) -> Adapter:
        """The adapter as it stands now, copied: later steps do not reach it."""
        start = self._start
        tensors = {**self._frozen, **self._named(self.master.detach())}
        return Adapter(start.plan, tensors, start.base, start.base_name, start.rendering)

    def load(self, flat: Tensor) -> None:
        """Overwrite every trained factor with a vector saved from `master`."""
        with torch.no_grad():
            self.master.copy_(flat)


def _forget(alive: weakref.ref[TrainState]) -> None:
    if (state := alive()) is not None:
        state._made_for = None


def _forget_after_steps(state: TrainState) -> None:
    """Have `state` make its views anew after every step of any torch optimizer that steps it."""
    alive = weakref.ref(state)

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        state = alive()
        if state is not None and any(p is state.master for group in optimizer.param_groups for p in group["params"]):
            state._made_for = None

    weakref.finalize(state, register_optimizer_step_post_hook(stepped).remove)
