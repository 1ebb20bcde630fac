"""torch.nn.Linear: weight (d_out, d_in), y = x Wᵀ + b. A subclass of it counts where it computes that."""

import inspect
from inspect import Parameter
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafit.layers.kind import Kind

SCALES = (1.0, 8.0, 0.125, 64.0)  # of the random inputs on which a subclass is tried
SUMS = 1e-5  # relative, beside the rounding of what comes out: sums of one product, added up in another order
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
    """Whether a subclass computes x Wᵀ + b. Tried once: weights of a base stay as they are."""
    if not isinstance(module, nn.Linear):
        return False
    if module not in _tried:
        _tried[module] = _is_plain(module) and _equals_linear(module)
    return _tried[module]


def _is_plain(module: nn.Linear) -> bool:
    """Whether it holds a weight and a bias and nothing else, is called with one thing and nothing else, as what takes
    its place is, and nothing reads the weight past its forward, as nn.MultiheadAttention does with its out_proj."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight.data) is not Tensor or weight.is_meta or not weight.is_floating_point():
        return False
    more = {*module._parameters} - {"weight", "bias"} or module._buffers or module._modules
    _, *given = inspect.signature(type(module).forward).parameters.values()
    one = len(given) == 1 and given[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return not more and one and not isinstance(module, NonDynamicallyQuantizableLinear)


def _equals_linear(module: nn.Linear) -> bool:
    weight = module.weight
    numbers = torch.randn(1, len(SCALES), module.in_features, generator=torch.Generator().manual_seed(0))
    x = (numbers * torch.tensor(SCALES)[:, None]).to(weight.device, weight.dtype)
    expected = F.linear(x, weight.detach(), None if module.bias is None else module.bias.detach())
    within = (2 * torch.finfo(weight.dtype).eps + SUMS) * expected.float().norm(dim=-1)
    before = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            for module.training in (False, True):  # dropout of its own shows in one of them
                own = type(module).forward(module, x)  # of the class, whatever is attached to the instance
                if own.shape != expected.shape or not ((own - expected).float().norm(dim=-1) <= within).all():
                    return False
        return True
    except Exception:  # it gives no tensor, or wants what is not there
        return False
    finally:
        module.training = before


KIND = Kind((nn.Linear,), _widths, _weight, _bias, stored=lambda module, matrix: matrix, computes_as=_computes_as)
