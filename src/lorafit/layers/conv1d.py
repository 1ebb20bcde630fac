"""Transformers' Conv1D (GPT-2): a linear layer stored transposed, weight (d_in, d_out), y = x W + b."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.layers.kind import Kind


def _widths(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, Conv1D)
    d_in, d_out = module.weight.shape
    return d_in, d_out


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, Conv1D)
    return module.weight.T


def _bias(module: nn.Module) -> Tensor | None:
    assert isinstance(module, Conv1D)
    return module.bias


KIND = Kind((Conv1D,), _widths, _weight, _bias, stored=lambda module, matrix: matrix.T)
