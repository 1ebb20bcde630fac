"""Tests by running a base how it may be run: a base and rows go in; a `ForwardMode` comes out.

Whether parts can be skipped or rows can be packed is a property of a model's structure, which is tested by the equality
of bits. Small differences in bf16 say nothing: packed and on its own, the NLL of the same token is rounded in different
ways, up to half a nat apart.
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
from lorafit.tasks.forward import batch_of, body, head_of
from lorafit.tasks.task import PLAIN, ForwardMode

PROBED = 64  # tokens of a row that are used
WATCHED = "lorafit_watched"  # the name under which transformers finds the attention that is compared
COPIED = 1 << 26  # the most parameters of the blocks that are copied to fp32, but at least one block
ROUNDING = 1e-4  # relative error of hidden states in fp32: 1,000 roundings of 6e-8; a wrong position gives 1e-2


def mode_of(base: Base, rows: Sequence[Row]) -> ForwardMode:
    """How this base may be run, tested on the beginnings of two rows. Raises NotCausalError like `require_causal`.

    The plain mode is for families that scale or cap their logits after the head, carry a state from token to token, or
    compute distances without position ids.
    """
    few = (beginnings(rows) * 2)[:2]  # with only one row, nothing could leak
    if few:
        require_causal(base, max(few, key=lambda row: len(row.ids)))
    with torch.no_grad():
        separate = _succeeds(lambda: _has_separate_head(base, few))
        return ForwardMode(
            separate,
            _succeeds(
                lambda: (
                    _keeps_rows_apart(base, few) and _computes_as_single(base, few) and _attends_as_in_fp32(base, few)
                )
            ),
        )


def beginnings(rows: Sequence[Row]) -> list[Row]:
    """The first PROBED tokens of the first two rows, all trained except the first token. They are short, because it is
    not yet known how many tokens fit into memory."""
    starts = [row.ids[:PROBED] for row in rows if len(row.ids) > 1][:2]
    return [Row(ids, (False, *[True] * (len(ids) - 1)), 0) for ids in starts]


@torch.no_grad()
def require_causal(base: Base, row: Row) -> None:
    """Raise NotCausalError if a later token of a row changes what the base predicts before it: it would be trained and
    scored on answers that it can see. Raises BaseError if this cannot be determined in the base's dtype."""
    known = sorted({*row.ids, abs(row.ids[0] - 1)})
    before = _logits(base, row)
    for cut in (len(row.ids) // 2, len(row.ids) - 1):
        others = (known[known.index(token) - 1] for token in row.ids[cut:])
        other = replace(row, ids=(*row.ids[:cut], *others))
        after = _logits(base, other)
        if not (before.isfinite().all() and after.isfinite().all()):
            return  # scoring reports this
        if not _alike_before(base, cut, row, other, before, after):
            raise NotCausalError(
                f"'{base.name}': a later token changes what it predicts before it, so it would be "
                "trained and scored on answers that it can see: choose a causal language model, which "
                "writes from left to right"
            )


def _alike_before(base: Base, cut: int, row: Row, other: Row, logits: Tensor, of_other: Tensor) -> bool:
    """Whether two rows that are equal before `cut` have the same logits there.

    An expert that gets other tokens may round differently. So if the bits differ, a comparison in fp32 decides, where
    only rounding is ignored; for a base in another dtype it uses a copy of the lowest blocks. If the base cannot be
    copied, the gradient decides. Raises BaseError if neither works.

    Args:
        base: The base.
        cut: The position of the first token that differs.
        row: A row.
        other: The row with other tokens from `cut` on.
        logits: The logits of `row`.
        of_other: The logits of `other`.
    """
    if torch.equal(logits[:cut], of_other[:cut]):
        return True
    if base.dtype == torch.float32:
        return _alike(logits[:cut], of_other[:cut])
    for test in (lambda: _alike_in_fp32(base, cut, row, other), lambda: _has_no_gradient_behind(base, cut, row)):
        try:
            return test()
        except (MemoryError, torch.OutOfMemoryError):  # not a property of the base
            raise
        except Exception as error:  # a family that does not support the test may raise anything
            why = error
    raise BaseError(
        f"'{base.name}': whether a later token changes what it predicts before it cannot be determined in "
        f"{str(base.dtype).removeprefix('torch.')} ({why}): open it in fp32, with --dtype fp32"
    ) from why


def _alike_in_fp32(base: Base, cut: int, row: Row, other: Row) -> bool:
    wide = _in_fp32(base)
    a, b = (_hidden(wide, each)[:cut] for each in (row, other))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a copy in fp32 gives no numbers")
    return _alike(a, b)


def _has_no_gradient_behind(base: Base, cut: int, row: Row) -> bool:
    """Whether the predictions before `cut` have no gradient at the tokens from `cut` on. The gradient is exactly zero
    at every token on which nothing depends, however an expert rounds."""
    ids = batch_of(base, [row], PLAIN).ids
    embedded: list[Tensor] = []

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*given: Any, **named: Any) -> Tensor:
            output = original(*given, **named)
            if not any(isinstance(value, Tensor) and torch.equal(value, ids) for value in (*given, *named.values())):
                return output  # an embedding of positions or of token types
            embedded.append(output.detach().requires_grad_())
            return embedded[-1].clone()  # the model may write to it

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
    """The logits (tokens, vocabulary) of a row on its own."""
    return body(base, batch_of(base, [row], PLAIN), PLAIN)[0, : len(row.ids)]


def _hidden(base: Base, row: Row) -> Tensor:
    """The last hidden states (tokens, width) of a row on its own."""
    return body(base, batch_of(base, [row], PLAIN), ForwardMode(True, False))[0, : len(row.ids)]


def _in_fp32(base: Base) -> Base:
    """The base if it is in fp32, or else a copy of its lowest blocks in fp32."""
    return base if base.dtype == torch.float32 else replace(base, model=_lowest_blocks_in_fp32(base))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors (tokens, width) in fp32 differ only by rounding."""
    return bool(((a - b).norm(dim=-1) <= ROUNDING * b.norm(dim=-1)).all())


def _succeeds(test: Callable[[], bool]) -> bool:
    """Whether a test holds. A family that does not support the test may raise anything, which counts as no."""
    try:
        return test()
    except (MemoryError, torch.OutOfMemoryError):  # not a property of the base
        raise
    except Exception:
        return False


def _has_separate_head(base: Base, rows: Sequence[Row]) -> bool:
    """Whether the logits are the head's output for the last hidden state, bit for bit."""
    head, batch = head_of(base.model), batch_of(base, rows, PLAIN)
    if head is None:
        return False
    logits = body(base, batch, PLAIN)
    of_head: Tensor = head(body(base, batch, ForwardMode(True, False)))
    return torch.equal(of_head.to(logits.dtype), logits)


def _keeps_rows_apart(base: Base, rows: Sequence[Row]) -> bool:
    """Whether no row of a pack depends on another: other tokens in one row change no bit of the others.

    An expert that gets more tokens may use another kernel and round differently. So if bits differ, the gradient
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
    batch, lengths = batch_of(base, rows, ForwardMode(True, True)), [len(row.ids) for row in rows]
    assert isinstance(base.model, PreTrainedModel)
    embedded = base.model.get_input_embeddings()(batch.ids).detach().requires_grad_()
    with torch.enable_grad(), packing(base):
        hidden = body(base, replace(batch, start=Start(embedded, 0)), ForwardMode(True, True))[0]
        for i, states in enumerate(hidden[: sum(lengths)].split(lengths)):
            # A plain sum would have no gradient after a norm.
            weights = torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype, device=states.device)
            (gradient,) = torch.autograd.grad((states * weights).sum(), embedded, retain_graph=True)
            parts = gradient[0, : sum(lengths)].split(lengths)
            if not parts[i].any() or any(part.any() for j, part in enumerate(parts) if j != i):
                return False
    return True


def _computes_as_single(base: Base, rows: Sequence[Row]) -> bool:
    """Whether the rows of a pack have the same hidden states as each row on its own, up to rounding in fp32. Of a base
    in another dtype the lowest blocks are copied to fp32."""
    wide = _in_fp32(base)
    return all(_alike(packed, _hidden(wide, row)) for packed, row in zip(_packed(wide, rows), rows, strict=True))


def _attends_as_in_fp32(base: Base, rows: Sequence[Row]) -> bool:
    """Whether attention over a pack, computed by the kernel of the base's dtype, gives the same result as in fp32.

    Attention is a mean of values. Rounding its weights and rounding the result each move it by at most half a unit in
    the last place of the largest value; attending to a wrong token moves it by as much as the values differ.
    """
    alike = []

    def both(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any) -> Any:
        output, _ = packs.attention(module, q, k, v, mask, **given)
        wide, _ = packs.attention(module, q.float(), k.float(), v.float(), mask, **given)
        within = 2 * torch.finfo(v.dtype).eps * v.float().abs().max()
        alike.append(bool(((output - wide).abs() <= within).all()))
        return output, None

    if base.dtype != torch.float32:
        with attending(base, WATCHED, both):
            body(base, batch_of(base, rows, ForwardMode(True, True)), ForwardMode(True, True))
    return all(alike)


def _packed(base: Base, rows: Sequence[Row]) -> list[Tensor]:
    """The last hidden states (tokens, width) of each row of a pack."""
    batch, lengths = batch_of(base, rows, ForwardMode(True, True)), [len(row.ids) for row in rows]
    with packing(base):
        hidden = body(base, batch, ForwardMode(True, True))[0]
    return list(hidden[: sum(lengths)].split(lengths))


def _vocabulary(base: Base) -> int:
    assert isinstance(base.model, PreTrainedModel)
    table: Any = base.model.get_input_embeddings()
    return len(table.weight)


class _WideLookup(nn.Module):
    """Looks up a base's embedding and returns it in fp32. The embedding is not a submodule, so that converting the copy
    does not convert the base."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self._of_base = (embedding,)

    def forward(self, *given: Any, **named: Any) -> Tensor:
        embedded: Tensor = self._of_base[0](*given, **named)
        return embedded.float()


def _lowest_blocks_in_fp32(base: Base) -> nn.Module:
    """A copy in fp32 of a model's body up to some block. It shares the base's embeddings, so it is small."""
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
