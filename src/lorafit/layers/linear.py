"""torch.nn.Linear: weight (d_out, d_in), y = x Wᵀ + b. A subclass belongs to this kind if it computes the same."""

import inspect
from inspect import Parameter
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafit.layers.kind import Kind

SCALES = (1.0, 8.0, 0.125, 64.0)  # of the random inputs with which a subclass is tested
# The relative difference that is allowed in addition to the rounding of the output: a subclass may add up the terms of
# the product in another order.
TOLERANCE = 1e-5
_tested: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _widths(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight


def _bias(module: nn.Module) -> Tensor | None:
    assert isinstance(module, nn.Linear)
    return module.bias


def _computes_as(module: nn.Module) -> bool:
    """Whether a subclass computes x Wᵀ + b. Each module is tested once, because a base's weights do not change."""
    if not isinstance(module, nn.Linear):
        return False
    if module not in _tested:
        _tested[module] = _is_plain(module) and _equals_linear(module)
    return _tested[module]


def _is_plain(module: nn.Linear) -> bool:
    """Whether the module holds only a weight and a bias, its forward takes one argument, like the forward that replaces
    it, and no parent reads its weight without calling it, as nn.MultiheadAttention does with out_proj."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight.data) is not Tensor or weight.is_meta or not weight.is_floating_point():
        return False
    more = {*module._parameters} - {"weight", "bias"} or module._buffers or module._modules
    _, *given = inspect.signature(type(module).forward).parameters.values()
    one = len(given) == 1 and given[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return not more and one and not isinstance(module, NonDynamicallyQuantizableLinear)


def _equals_linear(module: nn.Linear) -> bool:
    weight = module.weight
    noise = torch.randn(1, len(SCALES), module.in_features, generator=torch.Generator().manual_seed(0))
    x = (noise * torch.tensor(SCALES)[:, None]).to(weight.device, weight.dtype)
    expected = F.linear(x, weight.detach(), None if module.bias is None else module.bias.detach())
    allowed = (2 * torch.finfo(weight.dtype).eps + TOLERANCE) * expected.float().norm(dim=-1)
    before = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            for module.training in (False, True):  # a dropout in its forward shows in only one of the two modes
                y = type(module).forward(module, x)  # the class's forward, even if the instance has an adapter attached
                if y.shape != expected.shape or not ((y - expected).float().norm(dim=-1) <= allowed).all():
                    return False
        return True
    except Exception:  # its forward returns no tensor, or needs something that is missing here
        return False
    finally:
        module.training = before


KIND = Kind((nn.Linear,), _widths, _weight, _bias, stored=lambda module, matrix: matrix, computes_as=_computes_as)
