"""The laws, for every variant on every kind of layer, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import plain_module, tiny_gpt2, tiny_llama

from lorafit.base import Base
from lorafit.plan import LowRank, Plan
from lorafit.planning.rules import all_linear
from lorafit.testing import LAWS, Case
from lorafit.variants import VARIANTS

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "no-transformer": plain_module}


def make_case(name: str, variant: str, dtype: torch.dtype) -> Case:
    """Mixed ranks and scales, so that no law holds by uniformity."""
    model = MODELS[name]().to(dtype)
    base = Base.of(model, name)
    slots = [LowRank(site, 1 + i % 4, 4.0 + i % 3, variant) for i, site in enumerate(all_linear(base))]
    forward: Callable[[], torch.Tensor]
    if name == "no-transformer":
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        forward = lambda: model(x)  # noqa: E731
    else:
        ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
        forward = lambda: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    return Case(base, forward, Plan(tuple(slots)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
def test_law(law: Callable[[Case], None], model: str, variant: str, dtype: torch.dtype) -> None:
    law(make_case(model, variant, dtype))
