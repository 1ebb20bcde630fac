"""torch.nn.MultiheadAttention, where queries, keys and values are equally wide. It reads two weights past every
forward: its in_proj_weight (3·E, E), and that of its layer out_proj (E, E). Each is a site, and its adapter acts
through the module.
"""

from functools import partial

import torch
from torch import Tensor, nn

from lorafit.layers.kind import Kind


def _has_both(module: nn.Module) -> bool:
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
        bias=lambda module: None,  # what acts through the weight leaves the bias where it is
        stored=lambda module, matrix: matrix,
        computes_as=_has_both,
        is_product=False,
        any_variant=False,
        through=partial(_through, name),
        peft_below=peft_below,
    )


KINDS = {
    "attention.in_proj_weight": _kind("in_proj_weight", ""),
    "attention.out_proj.weight": _kind("out_proj.weight", ".base_layer.out_proj"),
}
