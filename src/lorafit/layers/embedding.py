"""torch.nn.Embedding: y = E[id], which is the product of Eᵀ (d_out, d_in) with a one-hot vector."""

import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.layers.kind import Kind


def _widths(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Embedding)
    return module.num_embeddings, module.embedding_dim


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Embedding)
    return module.weight.T


def _bias(module: nn.Module) -> None:
    return None


def _down(module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    return F.embedding(x.reshape(-1), a.T)


KIND = Kind(
    (nn.Embedding,),
    _widths,
    _weight,
    _bias,
    stored=lambda module, matrix: matrix.T,
    down=_down,
    is_product=False,
    any_variant=False,  # PEFT's DoRA takes the norms of an embedding per token, not per output
    fan_in=lambda site: 1,
    peft_names={"A": "lora_embedding_A", "B": "lora_embedding_B"},
)
