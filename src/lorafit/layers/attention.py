"""torch.nn.MultiheadAttention whose queries, keys and values have the same width E.

It reads two weights directly, without calling a layer: its in_proj_weight (3·E, E), and the weight (E, E) of its layer
out_proj. Each is a site. During a call of the module, a changed weight stands in for it.
"""

from functools import partial

import torch
from torch import Tensor, nn

from lorafit.layers.kind import Kind


def _has_in_proj(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim


def _widths(name: str, module: nn.Module) -> tuple[int, int]:
    d_out, d_in = module.get_parameter(name).shape
    return d_in, d_out


def _through(name: str, module: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    weight = module.get_parameter(name)
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)  # rounded once


def _kind(name: str, peft_below: str) -> Kind:
    return Kind(
        (),
        partial(_widths, name),
        weight=lambda module: module.get_parameter(name),
        bias=lambda module: None,  # only the weight is replaced; the module adds its own bias
        stored=lambda module, matrix: matrix,
        computes_as=_has_in_proj,
        is_product=False,
        any_variant=False,
        through=partial(_through, name),
        peft_below=peft_below,
    )


KINDS = {
    "attention.in_proj_weight": _kind("in_proj_weight", ""),
    "attention.out_proj.weight": _kind("out_proj.weight", ".base_layer.out_proj"),
}
