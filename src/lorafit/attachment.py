"""The only file that touches a model.

While attached, each site's `forward` is shadowed on the instance. Keys, types and bytes of the model stay as
they are, a parent that calls the module reaches the adapter, and a compiled model notices: torch's compiler
guards the forward of every module it has inlined and compiles anew, where it passes over hooks that were added
later (torch 2.13). Nothing else in lorafit changes a model.

Sites that are called with the very same tensor (q, k and v; gate and up) are computed together where the variant can:
the first forward of an attachment goes site by site and finds them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lorafit import landing
from lorafit import packing as packs
from lorafit.adapters.adapter import Adapter, initial
from lorafit.adapters.plan import LowRank, Plan
from lorafit.adapters.rendering import Rendering
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, AttachError, TargetError
from lorafit.layers import KINDS, kind_of
from lorafit.variants import VARIANTS, Frozen, Served

Forward = Callable[[], object]
T = TypeVar("T")


class Source(Protocol):
    """What can be attached: an Adapter, or the state that trains one."""

    @property
    def adapter(self) -> Adapter: ...
    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]: ...
    def drop(self, x: Tensor) -> Tensor: ...


class _Fused:
    """torch's fused encoder layer, which in `eval()` reads the weights of the layers within it past their forwards.

    Its switch is one for the whole process, so it is counted who wants it off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwanted = 0
        self._before = True

    @contextmanager
    def wanted(self, on: bool, model: nn.Module) -> Iterator[None]:
        """Off for the length of the block where the model has such layers; `on` within takes that back."""
        concerned = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
        change = 0 if not concerned else -1 if on else 1
        self._count(change)
        try:
            yield
        finally:
            self._count(-change)

    def _count(self, change: int) -> None:
        with self._lock:
            if change and not self._unwanted:
                self._before = mha.get_fastpath_enabled()
            if change:
                self._unwanted += change
                mha.set_fastpath_enabled(self._before and not self._unwanted)


_fused = _Fused()


def layer_by_layer(base: Base) -> AbstractContextManager[None]:
    """Have the base call every layer within torch's encoder layers for the length of the block, as `attach` does: fused
    they would pass over an adapter. What comes out is rounded along another path."""
    return _fused.wanted(False, base.model)


@dataclass
class Attachment:
    """A handle on an attached adapter: `with attachment.off(): ...` computes as the bare base, bit for bit."""

    plan: Plan
    model: nn.Module
    on: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            with _fused.wanted(True, self.model) if before else nullcontext():
                yield
        finally:
            self.on = before


class _Fixed:
    """An Adapter as a Source: its factors are cast once per dtype."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self._cast: dict[tuple[torch.dtype, torch.device], dict[str, dict[str, Tensor]]] = {}

    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        key = (dtype, device)
        if key not in self._cast:
            self._cast[key] = self.adapter.factors(dtype, device)
        return self._cast[key]

    def drop(self, x: Tensor) -> Tensor:
        return x


@contextmanager
def attach(base: Base, adapter: Adapter | Source, *, accept_unknown_base: bool = False) -> Iterator[Attachment]:
    """Attach an adapter, or the state that trains one, for the length of the block.

    Everything is checked before anything is touched: the adapter's base is this base (an adapter from
    elsewhere says none, and needs `accept_unknown_base`), and each slot lands on a module of its widths. The
    base's weights need no gradient inside the block. `backward()` under activation checkpointing must run
    inside it too. Raises AdapterError, or AttachError for a model in a state that cannot be adapted.
    """
    value = adapter if isinstance(adapter, Adapter) else adapter.adapter
    require_base(base, value.base, value.base_name, accept_unknown_base)
    value = landed(base, value) if value is adapter else value
    source: Source = _Fixed(value) if isinstance(adapter, Adapter) else adapter
    modules = _landing(base, value.plan)
    for slot in value.plan.slots:
        _require_bare(modules[slot.site.path], slot.site.path)
    attachment = Attachment(value.plan, base.model)
    flags = [(parameter, parameter.requires_grad) for parameter in base.model.parameters()]
    shadowed: list[nn.Module] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        shared = _Shared(source)
        for slot in value.plan.slots:
            module = modules[slot.site.path]
            module.forward = _adapted(_Place.of(module, slot), shared, attachment)
            shadowed.append(module)
        with layer_by_layer(base):
            yield attachment
    finally:
        for module in shadowed:
            vars(module).pop("forward", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class _Place:
    """One adapted site: what its module computes without, what it may read, how the pair acts."""

    original: Callable[..., Tensor]
    frozen: Frozen
    slot: LowRank

    @staticmethod
    def of(module: nn.Module, slot: LowRank) -> _Place:
        kind = KINDS[kind_of(module) or slot.site.kind]
        return _Place(module.forward, Frozen(kind.weight(module), kind.bias(module)), slot)


def _adapted(place: _Place, shared: _Shared, attachment: Attachment) -> Callable[..., Tensor]:
    def forward(input: Tensor) -> Tensor:
        return shared.forward(place, input) if attachment.on else place.original(input)

    return forward


@dataclass(eq=False)
class _Shared:
    """Finds the places that are called with the very same tensor, and computes them at the first one's call.

    Whatever does not come as expected is computed by itself: a place is given a kept output only for the tensor, in the
    state, and for the factors that the output was made from.
    """

    source: Source
    _groups: dict[_Place, list[_Place]] = field(default_factory=dict)  # by the place that is called first
    _last: tuple[weakref.ref[Tensor], int, _Place] | None = None
    _kept: tuple[tuple[weakref.ref[Tensor], int, object, bool], dict[_Place, Tensor]] | None = None

    def forward(self, place: _Place, x: Tensor) -> Tensor:
        dropped, factors = self.source.drop(x), self.source.factors(x.dtype, x.device)
        together = VARIANTS[place.slot.variant].together
        if together is None or dropped is not x or _watched(x):
            y, own = place.original(x), factors[place.slot.site.path]
            return VARIANTS[place.slot.variant].forward(dropped, y, place.frozen, own, place.slot.scaling)
        if (kept := self._kept) is not None and place in kept[1]:
            made_from, version, by, grad = kept[0]
            if made_from() is x and version == x._version and by is factors and grad == torch.is_grad_enabled():
                return kept[1].pop(place)
        self._learn(place, x)
        group = self._groups[place]
        self._kept = None  # what a forward that broke off has left
        first, *others = together(
            x, [one.original for one in group], [one.frozen for one in group],
            [factors[one.slot.site.path] for one in group], [one.slot.scaling for one in group],
        )  # fmt: skip
        made = (weakref.ref(x), x._version, factors, torch.is_grad_enabled())
        self._kept = (made, dict(zip(group[1:], others, strict=True)))
        return first

    def _learn(self, place: _Place, x: Tensor) -> None:
        """Have the place before call for this one too, if both are given the same tensor."""
        new = place not in self._groups
        self._groups.setdefault(place, [place])
        if self._last is not None and new:
            tensor, version, leader = self._last
            if tensor() is x and version == x._version and leader.slot.variant == place.slot.variant:
                self._groups[leader].append(place)
                return
        self._last = (weakref.ref(x), x._version, place)


def _watched(x: Tensor) -> bool:
    """Whether something around this call needs every site by itself.

    A compiler traces them. Tensors of inference mode do not count how often they are written to. Autocast reaches into
    single operations alone. torch.func differentiates in ways of its own. Activation checkpointing, which shows as
    hooks on saved tensors, computes a forward a second time, and must find that it saves as many as the first did.
    """
    return (
        torch.compiler.is_compiling()
        or x.is_inference()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def packing(base: Base, on: bool = True) -> AbstractContextManager[None]:
    """Have the model compute attention within the rows of a pack for the length of the block.

    Inside, the model is called with `segments` and with their positions. `on` False does nothing.
    """
    return attending(base, packs.NAME, packs.attention) if on else nullcontext()


@contextmanager
def attending(base: Base, name: str, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Have the model compute attention by this function for the length of the block, by its configuration.

    name: under which transformers finds it. It is called as transformers calls attention, with whatever the model is
    called with besides; in place of a mask it is given what `packing.window` gives: rows are kept apart without one.
    """
    model = base.model
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"{base.name}: no model of transformers, whose attention could be replaced: leave it as it is"
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, packs.window)
    before = _attention_of(model.config)
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def adapting(base: Base, change: Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """Have `change(number, x, original)` give what every site gives for x (..., d_in), for the length of the block.
    number: of the site in `base.sites`; original: what the site itself computes.

    This is how rows of many adapters run together: what a row's adapter adds is the business of `change`, and the
    model's structure stays as it is. Raises AttachError where another attachment is there.
    """
    require_bare(base)
    modules = [base.model.get_submodule(site.path) for site in base.sites]
    try:
        for number, module in enumerate(modules):
            module.forward = _changed(number, module.forward, change)
        with layer_by_layer(base):
            yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _changed(
    number: int, original: Callable[..., Tensor], change: Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]
) -> Callable[..., Tensor]:  # fmt: skip
    def forward(input: Tensor) -> Tensor:
        return change(number, input, original)

    return forward


def _attention_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How a configuration and those within it compute attention, in the form in which it can be set again."""
    within = {name: _attention_of(part) for name in config.sub_configs if (part := getattr(config, name, None))}
    return {"": config._attn_implementation, **within}


def blocks_of(base: Base) -> list[nn.Module]:
    """The blocks a model is a stack of, as its family names them; empty where it names none."""
    names = getattr(base.model, "_no_split_modules", None) or ()
    stacks = [
        list(module)
        for module in base.model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(part).__name__ in names for part in module)
    ]
    return max(stacks, key=len, default=[])


# Families whose body is: embed, then block after block over one stream, then a norm. Their blocks can be left out from
# below, and the stream given where the embedding would be.
STREAMS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def free_blocks(base: Base, plan: Plan) -> int:
    """How many of the lowest blocks need not be run again: those below every site, in a family of STREAMS."""
    model = base.model
    declared = isinstance(model, PreTrainedModel) and model.config.model_type in STREAMS
    return blocks_below(base, plan) if declared else 0


def blocks_below(base: Base, plan: Plan) -> int:
    """How many of the lowest blocks have no site of the plan, nor anything below them."""
    paths = {id(module): path for path, module in base.model.named_modules()}
    blocks = [f"{paths[id(block)]}." for block in blocks_of(base)]
    lowest = len(blocks) - 1
    for slot in plan.slots:
        inside = [i for i, path in enumerate(blocks) if slot.site.path.startswith(path)]
        if not inside and slot.site.path not in base.head_paths():
            return 0
        lowest = min([lowest, *inside])
    return max(0, lowest)


@contextmanager
def _shadowed(modules: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another forward for these modules, for the length of the block."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def skipping(base: Base, blocks: int) -> AbstractContextManager[None]:
    """Have the lowest `blocks` blocks hand on what they are given."""
    return _shadowed(blocks_of(base)[:blocks], lambda hidden_states, *_, **__: hidden_states)


class _Reached(Exception):
    pass


@contextmanager
def inputs_of_blocks(base: Base, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """What reaches these blocks, in their order, when the model is run inside: the run ends at the last of them. The
    list is filled then."""
    modules = blocks_of(base)
    seen: list[Tensor] = []

    def reached(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(hidden_states)
        raise _Reached

    def passed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden_states)
            return original(hidden_states, *args, **kwargs)

        return forward

    with ExitStack() as held:
        held.enter_context(suppress(_Reached))
        for block in blocks[:-1]:
            held.enter_context(_shadowed(modules[block : block + 1], passed(modules[block].forward)))
        held.enter_context(_shadowed(modules[blocks[-1] : blocks[-1] + 1], reached))
        yield seen


@contextmanager
def recomputing(base: Base, on: bool = True) -> Iterator[None]:
    """Have each block keep its input alone, and compute the rest again when the backward comes to it: the gradients are
    the same, for about a third more time. `on` False does nothing.

    Goes inside `attach` and `packing`, and `backward()` inside it. Raises AttachError for a model without known blocks.
    """
    blocks = blocks_of(base) if on else []
    if on and not blocks:
        raise AttachError(f"'{base.name}' names no blocks that could be computed twice: leave recomputing out")
    if shadowed := [block for block in blocks if "forward" in vars(block)]:
        raise AttachError(f"the forward of {type(shadowed[0]).__name__} is already replaced: leave that block first")
    try:
        for block in blocks:
            block.forward = _twice(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        return original(*args, **kwargs)

    return forward


def require_base(base: Base, identity: str | None, name: str | None, accept_unknown: bool = False) -> None:
    """Raise AdapterError unless this identity, which an adapter names as its base's, is the base's."""
    if identity is None:
        if not accept_unknown:
            raise AdapterError(
                "this adapter does not say which base it belongs to: if you know that it is "
                f"'{base.name}', accept it with accept_unknown_base=True (--accept-unknown-base)"
            )
    elif identity != base.identity:
        raise AdapterError(
            f"this adapter belongs to base '{name}' ({identity[:12]}), not to '{base.name}' "
            f"({base.identity[:12]}): open the base it was trained on"
        )


def require_fits(base: Base, adapter: Adapter, *, accept_unknown_base: bool = False) -> None:
    """Raise AdapterError where an adapter is another base's, or has a slot that lands on no module of its widths."""
    require_base(base, adapter.base, adapter.base_name, accept_unknown_base)
    _landing(base, landed(base, adapter).plan)


def landed(base: Base, adapter: Adapter) -> Adapter:
    """The adapter under the base's paths, checked: `landing.landed`."""
    return landing.landed(adapter, base.model, base.sites, base.name)


def _landing(base: Base, plan: Plan) -> dict[str, nn.Module]:
    """The module of every slot. Raises AdapterError listing every slot that does not land."""
    modules = dict(base.model.named_modules())
    problems = []
    for slot in plan.slots:
        site, module = slot.site, modules.get(slot.site.path)
        kind = kind_of(module) if module is not None else None
        if module is None:
            problems.append(f"{site.path}: the base has no such module")
        elif kind is None:
            problems.append(f"{site.path}: {type(module).__name__} is no kind of layer that can be adapted")
        elif KINDS[kind].widths(module) != (site.d_in, site.d_out):
            d_in, d_out = KINDS[kind].widths(module)
            problems.append(f"{site.path}: {d_in} → {d_out} in the base, {site.d_in} → {site.d_out} in the adapter")
    if problems:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise AdapterError(f"{len(problems)} slots do not land on '{base.name}'\n  " + "\n  ".join(shown)
                           + "\nopen the base it was trained on")  # fmt: skip
    return modules


def require_bare(base: Base) -> None:
    """Raise AttachError where anything is attached to a site of the base."""
    for site in base.sites:
        _require_bare(base.model.get_submodule(site.path), site.path)


def _require_bare(module: nn.Module, path: str) -> None:
    if "forward" in vars(module):
        raise AttachError(
            f"{path}: its forward is already replaced, by another attach or another library: "
            "leave that block first; one adapter is attached at a time"
        )


def fresh(base: Base, plan: Plan, seed: int, rendering: Rendering | None = None) -> Adapter:
    """An adapter for `base` that changes nothing yet: what training starts from."""
    modules = _landing(base, plan)
    weights = {slot.site.path: KINDS[slot.site.kind].weight(modules[slot.site.path]) for slot in plan.slots}
    name = base.address or base.name
    return initial(plan, weights, seed, base=base.identity, base_name=name, rendering=rendering)


def served(base: Base, adapter: Adapter) -> dict[int, Served]:
    """What the adapter adds at each site, in fp32 on the base's device, by the site's number in `base.sites`."""
    adapter = landed(base, adapter)
    modules = _landing(base, adapter.plan)
    numbers = {site.path: number for number, site in enumerate(base.sites)}
    factors = adapter.factors(torch.float32, base.device)
    made = {}
    for slot in adapter.plan.slots:
        place = _Place.of(modules[slot.site.path], slot)
        one = VARIANTS[slot.variant].served(place.frozen, factors[slot.site.path], slot.scaling)
        made[numbers[slot.site.path]] = one
    return made


def fired(base: Base, forward: Forward) -> frozenset[str]:
    """Paths of the sites that take part when `forward()` runs the base, e.g. on the user's rows: those that `attach`
    reaches, for they are found as it finds them."""
    seen: set[str] = set()

    def seeing(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            seen.add(path)
            return original(*given, **named)

        return forward

    with ExitStack() as held, torch.no_grad():
        held.enter_context(layer_by_layer(base))
        for site in base.sites:
            module = base.model.get_submodule(site.path)
            held.enter_context(_shadowed([module], seeing(site.path, module.forward)))
        forward()
    return frozenset(seen)


@contextmanager
def observing(
    base: Base, paths: Iterable[str], keep: Callable[[str, Tensor], T], see: Callable[[str, T, Tensor], None]
) -> Iterator[None]:  # fmt: skip
    """Watch these sites in every forward and backward inside. Goes inside `attach`.

    Args:
        base: the base whose sites are watched.
        paths: paths of the sites.
        keep: called in the forward with the path and x (tokens, d_in), what the site was given. Only what it returns is
            held until the backward, so where blocks are computed twice the inputs need not be held.
        see: called in the backward with the path, what `keep` returned, and g (tokens, d_out), the gradient at what
            came out of the site.
    """

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            kept = keep(path, given[0].detach().flatten(0, -2))
            output.register_hook(lambda g: see(path, kept, g.flatten(0, -2)))

        return seen

    handles = [base.model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_fired(plan: Plan, seen: frozenset[str]) -> None:
    """Raise TargetError naming every site of the plan that took no part: an adapter there would learn nothing."""
    silent = [slot.site.path for slot in plan.slots if slot.site.path not in seen]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise TargetError(
            f"{len(silent)} named sites take no part in a forward over your rows: {shown}: an adapter there would "
            "train and change nothing; leave them out of --targets"
        )


def merged(base: Base, adapter: Adapter, *, accept_unknown_base: bool = False) -> dict[str, Tensor]:
    """New weight tensors, W + ΔW, computed in fp32 and rounded once to the dtype of the base; by state-dict key.

    The base is only read. Raises AdapterError where a slot's weight is shared with another module (a head tied to the
    embedding): attached, the adapter acts on that slot alone; merged, it would change both.
    """
    require_base(base, adapter.base, adapter.base_name, accept_unknown_base)
    adapter = landed(base, adapter)
    modules = _landing(base, adapter.plan)
    shared = [f"{slot.site.path} (with {', '.join(tied)})" for slot in adapter.plan.slots
              if (tied := base.tied(slot.site.path))]  # fmt: skip
    if shared:
        raise AdapterError(
            f"cannot be merged, for its weight is shared with another module: {'; '.join(shared)}: keep the adapter "
            "attached, or open a base whose weights are apart (tie_word_embeddings: false)"
        )
    new = {}
    with torch.no_grad():
        for slot in adapter.plan.slots:
            module = modules[slot.site.path]
            kind = KINDS[kind_of(module) or slot.site.kind]
            weight = kind.weight(module)
            factors = {name: adapter.tensors[f"{slot.site.path}.{name}"].to(weight.device) for name in slot.shapes()}
            delta = VARIANTS[slot.variant].delta(Frozen(weight, None), factors, slot.scaling)
            total = (weight.float() + delta).to(weight.dtype)
            new[f"{slot.site.path}.weight"] = kind.stored(total).contiguous()
    return new
