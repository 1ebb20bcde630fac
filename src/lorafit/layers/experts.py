"""The experts of a mixture of experts in transformers 5.

One module holds all experts. Each projection is one parameter (experts, d_out, d_in), or (experts, d_in, d_out) if the
module is marked `is_transposed`, as in gpt-oss. An expert is not a layer that could be called, so the module computes
with W + s·B A in place of W for the length of a call. Each expert has its own A (rank, d_in) and B (d_out, rank).
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

# In the order in which transformers registers the parameters of a module; PEFT nests its wrappers in that order.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"  # not marked; (experts, d_in, d_out)
RANK_MULTIPLE = 8  # torch's grouped product needs rows of 16 bytes, so ranks are padded with zeros to a multiple


class Sum:
    """W + s·L R as an argument of torch's functions, in place of W (..., p, q); L (..., p, rank), R (..., rank, q).

    A product with it is computed as x W + s·(x L) R. The sum is not computed, the backward keeps nothing of its size,
    and in bf16 small parts of the delta are not rounded away. Every other function receives the sum itself.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float):
        self._parts = weight, left, right
        self._scaling = scaling
        self.dtype, self.device, self.shape = weight.dtype, weight.device, weight.shape

    def tensor(self) -> Tensor:
        """The sum, computed in fp32 and rounded once to the dtype of W."""
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
                    left, right = _padded(left, -1), _padded(right, -2)
                inner = function(first, left, **named) * second._scaling
                return function(first, weight, **named) + function(inner, right, **named)
            weight, left, right = first._parts
            inner = function(right, second, **named) * first._scaling
            return function(weight, second, **named) + function(left, inner, **named)
        tensors = [value.tensor() if isinstance(value, cls) else value for value in given]
        by_name = {key: value.tensor() if isinstance(value, cls) else value for key, value in named.items()}
        return function(*tensors, **by_name)


# The products in transformers' forwards of experts.
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch._grouped_mm)


def _padded(part: Tensor, dim: int) -> Tensor:
    missing = -part.shape[dim] % RANK_MULTIPLE
    return F.pad(part, (0, missing) if dim == -1 else (0, 0, 0, missing)) if missing else part


def _holds(name: str, module: nn.Module) -> bool:
    """Whether the module has this projection, and is marked by transformers' `use_experts_implementation` or is
    Llama 4's."""
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
    in_torch = getattr(getattr(module, "config", None), "_experts_implementation", None) in _IN_TORCH
    return summed if in_torch and not torch.compiler.is_compiling() else summed.tensor()


# The implementations of transformers that multiply with torch's functions; the others pass the weights to kernels.
_IN_TORCH = ("eager", "grouped_mm", "batched_mm")


def _bias(module: nn.Module) -> None:
    return None  # only the weight is replaced; the module adds the experts' biases, if there are any


def _written(site: Site, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors in PEFT's shapes for a parameter: A (experts · rank, d_in), B (d_out, rank · experts)."""
    a, b = factors["A"], factors["B"]
    return {"A": a.reshape(-1, site.d_in), "B": b.permute(1, 2, 0).reshape(site.d_out, -1)}


def _read(site: Site, pair: Mapping[str, Tensor]) -> dict[str, Tensor]:
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != site.d_in or len(b) != site.d_out or len(a) % site.count:
        raise ValueError(
            f"A {list(a.shape)} and B {list(b.shape)} do not fit the {site.count} experts of the plan: restore "
            "the folder"
        )
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
