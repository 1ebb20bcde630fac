"""torch.nn.Linear: weight (d_out, d_in), y = x Wᵀ + b."""

from torch import Tensor, nn

from lorafit.layers.kind import Kind


def _widths(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight


def _bias(module: nn.Module) -> Tensor | None:
    assert isinstance(module, nn.Linear)
    return module.bias


KIND = Kind((nn.Linear,), _widths, _weight, _bias, stored=lambda matrix: matrix)
