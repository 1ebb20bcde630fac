"""The experts of a mixture of experts in transformers 5: one module holds all of them, each projection as one parameter
(experts, d_out, d_in), or (experts, d_in, d_out) where the module says `is_transposed`, as gpt-oss does.

They are no layers of their own, so a pair acts through the module: for a call it computes with a weight that is
W + s·B A, each expert with its own A (rank, d_in) and B (d_out, rank).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.layers.kind import Kind
from lorafit.layers.site import Site

# Of one module in the order in which transformers registers them, which is the order in which PEFT nests them.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"  # (experts, d_in, d_out), and says nothing
TOGETHER = 8  # torch's grouped product wants rows of 16 bytes: ranks are filled up with zeros to whole multiples


class Sum:
    """W + s·L R in place of W (..., p, q), for torch's functions; L (..., p, rank), R (..., rank, q).

    Products are taken apart, as x W + s·(x L) R: the sum is not made, nothing of its size is kept for the backward, and
    in bf16 no small part of a delta is rounded away. Whatever else is asked of it gets the sum itself.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float):
        self._parts = weight, left, right
        self._scaling = scaling
        self.dtype, self.device, self.shape = weight.dtype, weight.device, weight.shape

    def made(self) -> Tensor:
        """The sum, in fp32 until it is rounded once."""
        weight, left, right = self._parts
        return (weight.float() + self._scaling * (left.float() @ right.float())).to(weight.dtype)

    def transpose(self, first: int, second: int) -> Sum:
        assert {first % len(self.shape), second % len(self.shape)} == {len(self.shape) - 1, len(self.shape) - 2}
        weight, left, right = self._parts
        return Sum(weight.mT, right.mT, left.mT, self._scaling)

    def __getitem__(self, experts: Any) -> Sum:
        weight, left, right = (part[experts] for part in self._parts)
        return Sum(weight, left, right, self._scaling)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        given: Any = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if function == F.linear and isinstance(given[1], cls):
            x, summed, *bias = given
            weight, left, right = summed._parts
            return F.linear(x, weight, *bias, **named) + F.linear(F.linear(x, right) * summed._scaling, left)
        if function in _PRODUCTS and len(given) == 2 and named.get("bias") is None:
            first, second = given
            if isinstance(second, cls):
                weight, left, right = second._parts
                if function == torch._grouped_mm:
                    left, right = _filled(left, -1), _filled(right, -2)
                inner = function(first, left, **named) * second._scaling
                return function(first, weight, **named) + function(inner, right, **named)
            weight, left, right = first._parts
            inner = function(right, second, **named) * first._scaling
            return function(weight, second, **named) + function(left, inner, **named)
        made = [one.made() if isinstance(one, cls) else one for one in given]
        return function(*made, **{name: one.made() if isinstance(one, cls) else one for name, one in named.items()})


# What transformers' forwards multiply with.
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch._grouped_mm)


def _filled(part: Tensor, dim: int) -> Tensor:
    lacking = -part.shape[dim] % TOGETHER
    return F.pad(part, (0, lacking) if dim == -1 else (0, 0, 0, lacking)) if lacking else part


def _holds(name: str, module: nn.Module) -> bool:
    """Whether a module is one that transformers' `use_experts_implementation` has marked, or Llama 4's, with this
    projection."""
    marked = hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")
    marked = marked or _is_of_llama4(module)
    weight = module._parameters.get(name) if marked else None
    return weight is not None and weight.ndim == 3 and len(weight) > 1


def _weight(name: str, module: nn.Module) -> Tensor:
    return _stored(module, module.get_parameter(name))


def _stored(module: nn.Module, matrices: Tensor) -> Tensor:
    return matrices.mT if _is_transposed(module) else matrices


def _is_transposed(module: nn.Module) -> bool:
    return _is_of_llama4(module) or bool(module.is_transposed)


def _is_of_llama4(module: nn.Module) -> bool:
    """Known by the name of its type, so that the family is imported only where it is used."""
    return f"{type(module).__module__}.{type(module).__name__}" == _LLAMA4


def _widths(name: str, module: nn.Module) -> tuple[int, int]:
    _, d_out, d_in = _weight(name, module).shape
    return d_in, d_out


def _form(name: str, module: nn.Module) -> tuple[int, ...]:
    return (len(module.get_parameter(name)),)


def _through(name: str, module: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Sum | Tensor:
    left, right = (a.mT, b.mT) if _is_transposed(module) else (b, a)
    summed = Sum(module.get_parameter(name), left, right, scaling)
    apart = getattr(getattr(module, "config", None), "_experts_implementation", None) in _APART
    return summed if apart and not torch.compiler.is_compiling() else summed.made()


_APART = ("eager", "grouped_mm", "batched_mm")  # of transformers' implementations: others hand weights to kernels


def _bias(module: nn.Module) -> None:
    return None  # each expert has one of its own, if any; what acts through the weight leaves them as they are


def _written(site: Site, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As PEFT keeps the pairs of a parameter: A (experts · rank, d_in), B (d_out, rank · experts)."""
    a, b = factors["A"], factors["B"]
    return {"A": a.reshape(-1, site.d_in), "B": b.permute(1, 2, 0).reshape(site.d_out, -1)}


def _read(site: Site, pair: Mapping[str, Tensor]) -> dict[str, Tensor]:
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != site.d_in or len(b) != site.d_out or len(a) % site.count:
        raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} are not of {site.count} experts as the plan says")
    return {
        "A": a.reshape(site.count, -1, site.d_in),
        "B": b.reshape(site.d_out, -1, site.count).permute(2, 0, 1),
    }


def _kind(name: str) -> Kind:
    return Kind(
        (),
        partial(_widths, name),
        partial(_weight, name),
        _bias,
        stored=_stored,
        computes_as=partial(_holds, name),
        is_product=False,
        any_variant=False,
        form=partial(_form, name),
        through=partial(_through, name),
        written=_written,
        read=_read,
    )


KINDS = {f"experts.{name}": _kind(name) for name in PARAMETERS}
