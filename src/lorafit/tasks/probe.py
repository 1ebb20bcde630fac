"""How a base may be run, found out by running it: see `completion.Way`.

What may be skipped or packed is a property of a model's structure, so structure is what is tested, by equality of bits.
A difference between two numbers in bf16 says nothing: packed and on its own, the same token's NLL is rounded along two
paths, up to half a nat apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.attachment import packing as packs
from lorafit.attachment.attention import attending, packing
from lorafit.attachment.blocks import blocks_of, shadowed
from lorafit.bases.base import Base
from lorafit.data.batches import Start
from lorafit.data.render import Row
from lorafit.errors import BaseError, NotCausalError
from lorafit.tasks.completion import PLAIN, Way, batch_of, body, head_of

PROBED = 64  # tokens of a row that are looked at
WATCHED = "lorafit_watched"  # under which transformers finds attention that is compared
COPIED = 1 << 26  # numbers of the blocks that are copied to fp32, at least one block
ROUNDING = 1e-4  # relative, of hidden states in fp32: some 1,000 roundings of 6e-8; another position is off by 1e-2


def way_of(base: Base, rows: Sequence[Row]) -> Way:
    """How this base may be run, by the beginnings of two rows. Raises NotCausalError as `require_causal` does.

    Some families scale or cap their logits after the head, carry a state from token to token, or take distances from
    elsewhere than position ids: those are run the plain way.
    """
    few = (beginnings(rows) * 2)[:2]  # two, or nothing could leak
    if few:
        require_causal(base, max(few, key=lambda row: len(row.ids)))
    with torch.no_grad():
        separate = _succeeds(lambda: _has_separate_head(base, few))
        return Way(
            separate,
            _succeeds(
                lambda: (
                    _keeps_rows_apart(base, few) and _computes_as_alone(base, few) and _attends_as_in_fp32(base, few)
                )
            ),
        )


def beginnings(rows: Sequence[Row]) -> list[Row]:
    """Of the first two rows at most PROBED tokens each, all trained but the first: what is looked at before it is known
    how much may be run at a time."""
    ids = [row.ids[:PROBED] for row in rows if len(row.ids) > 1][:2]
    return [Row(one, (False, *[True] * (len(one) - 1)), 0) for one in ids]


@torch.no_grad()
def require_causal(base: Base, row: Row) -> None:
    """Raise NotCausalError where a later token of a row is seen to change what the base predicts before it: it would be
    trained and scored on answers that it can see. Raises BaseError where that cannot be told in the base's dtype."""
    known = sorted({*row.ids, abs(row.ids[0] - 1)})
    before = _logits(base, row)
    for cut in (len(row.ids) // 2, len(row.ids) - 1):
        others = (known[known.index(token) - 1] for token in row.ids[cut:])
        other = replace(row, ids=(*row.ids[:cut], *others))
        after = _logits(base, other)
        if not (before.isfinite().all() and after.isfinite().all()):
            return  # told where it is scored
        if not _alike_before(base, cut, row, other, before, after):
            raise NotCausalError(
                f"'{base.name}': a later token changes what it predicts before it, so it would be "
                "trained and scored on answers that it can see: choose a causal language model, which "
                "writes from left to right"
            )


def _alike_before(base: Base, cut: int, row: Row, other: Row, logits: Tensor, of_other: Tensor) -> bool:
    """Whether two rows that part at `cut` have the same bits before it.

    An expert that is given other tokens may round otherwise, so where bits differ fp32 decides, in which what is more
    than rounding shows: of a base in another dtype, in a copy of the lowest blocks. Of a base that cannot be copied the
    gradient decides. Raises BaseError where neither can be had.
    """
    if torch.equal(logits[:cut], of_other[:cut]):
        return True
    if base.dtype == torch.float32:
        return _alike(logits[:cut], of_other[:cut])
    for told in (lambda: _alike_in_fp32(base, cut, row, other), lambda: _has_no_gradient_behind(base, cut, row)):
        try:
            return told()
        except (MemoryError, torch.OutOfMemoryError):  # says nothing of the base
            raise
        except Exception as error:  # a family that cannot be cut, or called so, fails in whatever way it does
            why = error
    raise BaseError(
        f"'{base.name}': whether a later token changes what it predicts before it cannot be told in "
        f"{str(base.dtype).removeprefix('torch.')} ({why}): open it in fp32, with --dtype fp32"
    ) from why


def _alike_in_fp32(base: Base, cut: int, row: Row, other: Row) -> bool:
    wide = _in_fp32(base)
    a, b = (_hidden(wide, one)[:cut] for one in (row, other))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a copy in fp32 gives no numbers")
    return _alike(a, b)


def _has_no_gradient_behind(base: Base, cut: int, row: Row) -> bool:
    """Whether what is predicted before `cut` has no gradient at the tokens from there on. It is exactly zero at every
    token on which nothing depends, however an expert rounds."""
    ids = batch_of(base, [row], PLAIN).ids
    embedded: list[Tensor] = []

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*given: Any, **named: Any) -> Tensor:
            found = original(*given, **named)
            if not any(isinstance(one, Tensor) and torch.equal(one, ids) for one in (*given, *named.values())):
                return found  # of positions, or of kinds of tokens
            embedded.append(found.detach().requires_grad_())
            return embedded[-1].clone()  # which a model may write to

        return forward

    with torch.enable_grad(), ExitStack() as held:
        for table in [module for module in base.model.modules() if isinstance(module, nn.Embedding)]:
            held.enter_context(shadowed([table], watched(table.forward)))
        before = _logits(base, row)[:cut].float()
        some = torch.linspace(-1, 1, before.shape[-1], device=before.device)
        gradients = torch.autograd.grad((before * some).sum(), embedded)
    if not any(gradient[0, :cut].any() for gradient in gradients):
        raise ValueError("no gradient reaches its embedding")
    return not any(gradient[0, cut:].any() for gradient in gradients)


def _logits(base: Base, row: Row) -> Tensor:
    """(tokens, vocabulary), of a row on its own."""
    return body(base, batch_of(base, [row], PLAIN), PLAIN)[0, : len(row.ids)]


def _hidden(base: Base, row: Row) -> Tensor:
    """The last hidden states (tokens, width) of a row on its own."""
    return body(base, batch_of(base, [row], PLAIN), Way(True, False))[0, : len(row.ids)]


def _in_fp32(base: Base) -> Base:
    """The base, or in another dtype a copy of its lowest blocks."""
    return base if base.dtype == torch.float32 else replace(base, model=_lowest_blocks_in_fp32(base))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors (tokens, width) in fp32 differ by rounding alone."""
    return bool(((a - b).norm(dim=-1) <= ROUNDING * b.norm(dim=-1)).all())


def _succeeds(test: Callable[[], bool]) -> bool:
    """Whether a test holds; a family that takes no such arguments, or wants a mask, fails in whatever way it does."""
    try:
        return test()
    except (MemoryError, torch.OutOfMemoryError):  # says nothing of the base
        raise
    except Exception:
        return False


def _has_separate_head(base: Base, rows: Sequence[Row]) -> bool:
    """Whether the logits are the head's output for the last hidden state, bit for bit."""
    head, batch = head_of(base.model), batch_of(base, rows, PLAIN)
    if head is None:
        return False
    logits = body(base, batch, PLAIN)
    own: Tensor = head(body(base, batch, Way(True, False)))
    return torch.equal(own.to(logits.dtype), logits)


def _keeps_rows_apart(base: Base, rows: Sequence[Row]) -> bool:
    """Whether no row of a pack depends on another: other tokens in one leave every bit of the others as it was.

    An expert that is given more tokens may take another kernel, and round otherwise, so where bits differ the gradient
    decides: it is exactly zero at every token on which a row does not depend.
    """
    return _leaves_others(base, rows) or _has_no_gradient_across(base, rows)


def _leaves_others(base: Base, rows: Sequence[Row]) -> bool:
    before = _packed(base, rows)
    for i, row in enumerate(rows):
        other = replace(row, ids=tuple((token + 1) % _vocabulary(base) for token in row.ids))
        after = _packed(base, [*rows[:i], other, *rows[i + 1 :]])
        if not all(torch.equal(before[j], after[j]) for j in range(len(rows)) if j != i):
            return False
    return True


def _has_no_gradient_across(base: Base, rows: Sequence[Row]) -> bool:
    batch, lengths = batch_of(base, rows, Way(True, True)), [len(row.ids) for row in rows]
    assert isinstance(base.model, PreTrainedModel)
    embedded = base.model.get_input_embeddings()(batch.ids).detach().requires_grad_()
    with torch.enable_grad(), packing(base):
        hidden = body(base, replace(batch, start=Start(embedded, 0)), Way(True, True))[0]
        for i, own in enumerate(hidden[: sum(lengths)].split(lengths)):
            # A plain sum would have no gradient behind a norm.
            some = torch.linspace(-1, 1, own.shape[-1], dtype=own.dtype, device=own.device)
            (gradient,) = torch.autograd.grad((own * some).sum(), embedded, retain_graph=True)
            parts = gradient[0, : sum(lengths)].split(lengths)
            if not parts[i].any() or any(part.any() for j, part in enumerate(parts) if j != i):
                return False
    return True


def _computes_as_alone(base: Base, rows: Sequence[Row]) -> bool:
    """Whether the rows of a pack have the hidden states that each has on its own. In fp32, where a difference that is
    more than rounding shows: of a base in another dtype the lowest blocks are copied."""
    wide = _in_fp32(base)
    return all(_alike(packed, _hidden(wide, row)) for packed, row in zip(_packed(wide, rows), rows, strict=True))


def _attends_as_in_fp32(base: Base, rows: Sequence[Row]) -> bool:
    """Whether attention over a pack, which other kernels compute in other dtypes, gives what it gives in fp32.

    It is a mean of values: rounding its weights and rounding it move it by half a unit in the last place of the largest
    value each. Another row's token, or a later one, moves it by as much as values differ.
    """
    alike = []

    def both(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any) -> Any:
        own, _ = packs.attention(module, q, k, v, mask, **given)
        wide, _ = packs.attention(module, q.float(), k.float(), v.float(), mask, **given)
        within = 2 * torch.finfo(v.dtype).eps * v.float().abs().max()
        alike.append(bool(((own - wide).abs() <= within).all()))
        return own, None

    if base.dtype != torch.float32:
        with attending(base, WATCHED, both):
            body(base, batch_of(base, rows, Way(True, True)), Way(True, True))
    return all(alike)


def _packed(base: Base, rows: Sequence[Row]) -> list[Tensor]:
    """The last hidden states (tokens, width) of each row of a pack."""
    batch, lengths = batch_of(base, rows, Way(True, True)), [len(row.ids) for row in rows]
    with packing(base):
        hidden = body(base, batch, Way(True, True))[0]
    return list(hidden[: sum(lengths)].split(lengths))


def _vocabulary(base: Base) -> int:
    assert isinstance(base.model, PreTrainedModel)
    table: Any = base.model.get_input_embeddings()
    return len(table.weight)


class _WideLookup(nn.Module):
    """An embedding of a base, its output in fp32. It is no submodule: what converts a copy must not reach the base."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self._of_base = (embedding,)

    def forward(self, *given: Any, **named: Any) -> Tensor:
        found: Tensor = self._of_base[0](*given, **named)
        return found.float()


def _lowest_blocks_in_fp32(base: Base) -> nn.Module:
    """A copy of a model's body that ends after some blocks, with the base's own embeddings: small beside the base."""
    assert isinstance(base.model, PreTrainedModel)
    blocks = blocks_of(base)
    size = sum(parameter.numel() for parameter in blocks[0].parameters()) if blocks else 1
    above = blocks[max(1, COPIED // size) :]
    memo: dict[int, Any] = {id(block): None for block in above}
    tables = {module for module in base.model.modules() if isinstance(module, nn.Embedding)}
    memo |= {id(table): _WideLookup(table) for table in tables | {base.model.get_input_embeddings()}}
    small: nn.Module = copy.deepcopy(base.model.base_model, memo)
    for stack in [module for module in small.modules() if isinstance(module, nn.ModuleList)]:
        if (kept := sum(block is not None for block in stack)) < len(stack):
            del stack[kept:]
    return small.float()
