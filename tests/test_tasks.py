"""The laws of tasks: both of ours keep them, and each breach is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import Tensor
from transformers import LlamaForSequenceClassification

from lorafit.adapters.plan import Plan, Whole, uniform
from lorafit.adapters.rendering import Classes
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.planning.rules import all_linear
from lorafit.tasks.classification import Classification, LabelledRow
from lorafit.tasks.completion import COMPLETION, Completion
from lorafit.testing import TaskCase, check_task

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (5, 17, 9)


def written() -> TaskCase:
    base = Base.of(tiny_llama(), "writes")
    rows = [Row(tuple(range(20, 20 + n)), (*[False] * (n - 3), *[True] * 3), i) for i, n in enumerate(LENGTHS)]
    return TaskCase(base, COMPLETION, rows, uniform(all_linear(base), 2, 4.0))


def labelled(weights: tuple[float, ...] = ()) -> TaskCase:
    config = tiny_llama().config
    config.num_labels = 3
    torch.manual_seed(0)
    base = replace(Base.of(LlamaForSequenceClassification(config).eval(), "tells apart"), head=("score",))
    ends = [(*[False] * (n - 1), True) for n in LENGTHS]
    rows = [LabelledRow(tuple(range(20, 20 + n)), ends[i], i, label=i) for i, n in enumerate(LENGTHS)]
    plan = Plan(uniform(all_linear(base), 2, 4.0).slots, (Whole("score", (("weight", (3, 32)),)),))
    return TaskCase(base, Classification(Classes(("a", "b", "c"), 256, weights)), rows, plan)


@pytest.mark.parametrize(
    "case", [written, labelled, lambda: labelled((0.5, 1.0, 2.0))], ids=["completion", "classification", "weighted"]
)
def test_our_tasks_keep_the_laws(case: Any) -> None:
    check_task(case())


@dataclass(frozen=True)
class Owned(Completion):
    """The targets of a batch are told to be of its rows in the wrong order."""

    def batch(self, *given: Any) -> Any:
        made = super().batch(*given)
        return replace(made, owner=made.owner.flip(0))


@dataclass(frozen=True)
class Summed(Completion):
    """One NLL, where each target has one."""

    def nll(self, *given: Any) -> Tensor:
        return super().nll(*given).sum()[None]


@dataclass(frozen=True)
class Unequal(Completion):
    """A batch of several rows has the NLL of its rows, and other gradients."""

    def nll(self, base: Any, batch: Any, mode: Any) -> Tensor:
        nll = super().nll(base, batch, mode)
        return nll.detach() + batch.rows * (nll - nll.detach())


@dataclass(frozen=True)
class Short(Completion):
    """Probes of half the length."""

    def probes(self, rows: Any, lengths: Any) -> list[Row]:
        return super().probes(rows, [n // 2 + 1 for n in lengths])


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Owned(), r"1\. A batch counts its rows.*: owner is \[2, 2, 2, 1"),
        (Summed(), r"2\. Every target has one NLL.*: shape \(1,\), of 9 targets"),
        (Unequal(), r"3\. The gradient of a step.*: one row at a time it differs by"),
        (Short(), r"4\. Probes have the lengths.*where \[17, 3, 8\] were asked for"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_task_that_breaks_one_is_told_which(task: Completion, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_task(replace(written(), task=task))
