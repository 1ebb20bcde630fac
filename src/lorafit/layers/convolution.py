"""torch.nn.Conv1d, Conv2d and Conv3d: each position of the output is the product of W with the inputs under the kernel.

W (d_out, d_in) is the weight (out_channels, in_channels / groups, *kernel), flattened after its first dimension. A acts
as a convolution with the module's own settings, with the same kernels for every group; B acts as a convolution with a
kernel of size 1. The change of the weight is therefore B A, for any number of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lorafit.layers.kind import Kind
from lorafit.layers.site import Site

_BY_DIMENSIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv(module: nn.Module) -> _ConvNd:
    assert isinstance(module, _ConvNd)
    return module


def _widths(module: nn.Module) -> tuple[int, int]:
    weight = _conv(module).weight
    return weight[0].numel(), len(weight)


def _form(module: nn.Module) -> tuple[int, ...]:
    """(groups, *kernel_size)."""
    conv = _conv(module)
    return (conv.groups, *conv.kernel_size)


def _stored(module: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.reshape(_conv(module).weight.shape)


def _down(module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """Apply A: x ([N,] in_channels, *positions) -> ([N,] groups * rank, *positions of the output)."""
    conv = _conv(module)
    kernels = a.reshape(len(a), *conv.weight.shape[1:])
    return conv._conv_forward(x, torch.cat([kernels] * conv.groups), None)


def _up(module: nn.Module, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
    dimensions = len(_conv(module).kernel_size)
    added = _BY_DIMENSIONS[dimensions](u, b.reshape(*b.shape, *(1,) * dimensions), groups=_conv(module).groups)
    return torch.add(y, added, alpha=scaling)


def _written(site: Site, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our factors in PEFT's shapes. PEFT's A reads all input channels, so it holds our A once for each group, at the
    channels of that group, and zeros elsewhere."""
    groups, *kernel = site.form
    ones = (1,) * len(kernel)
    a, b = factors["A"], factors["B"]
    kernels = a.reshape(len(a), -1, *kernel)
    blocks = a.new_zeros(groups, len(a), groups, *kernels.shape[1:])
    for group in range(groups):
        blocks[group, :, group] = kernels
    written = {"A": blocks.flatten(2, 3).flatten(0, 1), "B": b.reshape(*b.shape, *ones)}
    return written | {name: factors[name].reshape(1, -1, *ones) for name in factors if name not in written}


def _read(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups, *kernel = site.form
    a, b = tensors["A"], tensors["B"]
    if site_of(site.path, a, b) != site:
        raise ValueError(
            f"A {list(a.shape)} and B {list(b.shape)} do not fit the convolution that the plan names: restore "
            "the folder"
        )
    rank = b.shape[1]
    factors = {name: tensor.flatten() for name, tensor in tensors.items()}
    factors |= {"A": a.reshape(groups, rank, groups, -1, *kernel)[0, :, 0].flatten(1), "B": b.flatten(1)}
    if groups > 1 and not torch.equal(_written(site, factors)["A"], a):
        raise ValueError(
            f"its A differs between the {groups} groups, or reads channels of other groups, so it does not correspond "
            "to a change of the convolution's weight: leave this layer out of target_modules when you train it"
        )
    return factors


def site_of(path: str, a: Tensor, b: Tensor) -> Site:
    """The site to which a convolution's pair from PEFT belongs.

    Args:
        path: The path of the module.
        a: (groups * rank, in_channels, *kernel).
        b: (out_channels, rank, 1, ...).

    Raises:
        ValueError: If a and b are not such a pair.
    """
    rank = b.shape[1] if b.dim() == a.dim() and set(b.shape[2:]) == {1} else 0
    if not rank or len(a) % rank or a.shape[1] % (len(a) // rank) or len(b) % (len(a) // rank):
        raise ValueError("lora_A and lora_B are not a pair of convolutions")
    groups = len(a) // rank
    return Site(path, "convolution", a[0].numel() // groups, len(b), (groups, *a.shape[2:]))


KIND = Kind(
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    _widths,
    weight=lambda module: _conv(module).weight.flatten(1),
    bias=lambda module: _conv(module).bias,
    stored=_stored,
    down=_down,
    up=_up,
    is_product=False,
    form=_form,
    out_dim=lambda module: -1 - len(_conv(module).kernel_size),
    written=_written,
    read=_read,
)
