"""Finds quantised weights: codes that a module unpacks as it computes, where an adapter needs numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.errors import BaseError


def require_numbers(model: nn.Module, name: str) -> None:
    """Raise BaseError where a weight is codes rather than a matrix of numbers. name: of the base, for the message."""
    coded = [f"{path}.{weight}".lstrip(".") for path, module in model.named_modules() for weight in _codes(module)]
    if coded:
        raise BaseError(
            f"'{name}': {len(coded)} of its weights are quantised, such as {coded[0]}, and such weights "
            "are not read yet: open the 16-bit model they were made from"
        )


def _codes(module: nn.Module) -> list[str]:
    """Names of codes among the parameters, buffers and packed weights of a module, without those of its children.

    A buffer of whole numbers may also be a mask, or a table of positions. Codes are at most 4 bytes wide, in a layer
    that holds their scales and no matrix of numbers.
    """
    parameters = {name: tensor.data for name, tensor in module._parameters.items() if tensor is not None}
    buffers = {name: tensor for name, tensor in module._buffers.items() if tensor is not None}
    codes = [name for name, tensor in parameters.items() if type(tensor) is not Tensor or _is_coded(tensor)]
    coded_buffers = {name: tensor for name, tensor in buffers.items() if _is_coded(tensor)}
    codes += [name for name, tensor in coded_buffers.items() if tensor.is_floating_point() or tensor.is_quantized]
    is_layer = not module._modules and any(t.is_floating_point() for t in (*parameters.values(), *buffers.values()))
    if is_layer and all(_is_coded(tensor) for tensor in parameters.values() if tensor.ndim > 1):
        codes += [name for name, t in coded_buffers.items() if t.dtype != torch.bool and t.element_size() <= 4]
    # torch's own quantised layers hold their weights in an object.
    return [*dict.fromkeys(codes), *(name for name, held in vars(module).items() if type(held) is torch.ScriptObject)]


def _is_coded(tensor: Tensor) -> bool:
    """Whether this is a matrix of anything but numbers of at least 16 bits."""
    return tensor.ndim > 1 and not (tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() > 1))
