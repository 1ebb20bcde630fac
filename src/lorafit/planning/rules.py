"""The rules by which a run is planned before anything is trained.

Capacity: LoRA parameters ≥ trained tokens (Tinker primer). Learning rate: 5e-4 · (2000 / hidden)^0.781 at alpha 32
(fitted over a public sweep of models, tinker-cookbook; unproven below 1B, measured good at 135M here).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers.modeling_utils import PreTrainedModel

from lorafit.adapters.formats.oddities import refused_by_peft
from lorafit.adapters.plan import Plan, Whole, uniform
from lorafit.attachment.blocks import blocks_below, free_blocks
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.errors import BaseError, SettingsError, TargetError
from lorafit.layers import KINDS
from lorafit.layers.site import Site, matches, select
from lorafit.settings import TrainSettings
from lorafit.training.recipe import Recipe
from lorafit.variants import VARIANTS

# Where it is trimmed afterwards, a run begins with more rank than is needed and ends with less than it began with: on
# short runs rank 32 was better than 8 at equal rate (bench/planning.py).
SMALLEST_RANK, TRIMMED_RANK, LARGEST_RANK = 8, 32, 64
# Steps × rate decides how much is learnt, so small sets get small batches: at equal tokens batches of 4 instead
# of 8 raised the accuracy on the built-in handbook from 85 to 92 %.
BATCHES = ((4, 2_000), (8, 8_000), (16, 32_000), (32, math.inf))
STEPS_WANTED, MOST_EPOCHS = 450, 3.0
# A label says less than an answer. Of 800 film reviews a classifier learnt nothing at the full rate in batches of 8; a
# third of it in batches of 16 got four in five right, best after 40 to 120 steps (docs/log.md).
LABEL_RATE, LABEL_BATCH, LABEL_STEPS = 1 / 3, 16, 250
WORTH_TELLING = 0.01  # share of the base's parameters that is told by the kind of module it is in


@dataclass(frozen=True)
class Choice:
    """One decision: what was chosen, why, and the flag that replaces it."""

    name: str
    value: str
    reason: str
    flag: str


@dataclass(frozen=True)
class Decision:
    """A plan, the recipe to train it, the choices behind both."""

    plan: Plan
    recipe: Recipe
    choices: tuple[Choice, ...]


def told(decision: Decision, name: str, value: str, reason: str, flag: str = "") -> Decision:
    """The decision with the choice of this name replaced, or added at the end; its flag stays where none is given."""
    old = next((choice for choice in decision.choices if choice.name == name), None)
    new = Choice(name, value, reason, flag or (old.flag if old else ""))
    if old is None:
        return replace(decision, choices=(*decision.choices, new))
    return replace(decision, choices=tuple(new if choice is old else choice for choice in decision.choices))


def told_rank(decision: Decision, reason: str) -> Decision:
    """The decision with what the plan says of rank and size."""
    plan = decision.plan
    ranks = sorted({slot.rank for slot in plan.slots})
    value = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    decision = told(decision, "rank", f"{value} (alpha {plan.slots[0].alpha:g})", reason)
    return told(decision, "adapter", f"{plan.parameters:,} parameters, {plan.bytes / 1e6:.1f} MB", reason)


def rank_by_capacity(trained_tokens: int, per_rank: int, least: int = SMALLEST_RANK) -> int:
    """Next power of two at or above twice ceil(trained tokens / parameters per unit of rank), within 8 … 64."""
    needed = 2 * math.ceil(trained_tokens / per_rank)
    return min(LARGEST_RANK, max(least, 1 << math.ceil(math.log2(max(1, needed)))))


def learning_rate_by_width(hidden: int) -> float:
    """5e-4 · (2000 / hidden)^0.781, to two digits; for alpha 32."""
    return float(f"{5e-4 * (2000 / hidden) ** 0.781:.1e}")


def all_linear(base: Base) -> tuple[Site, ...]:
    """Every site of the base but its output head, and what PEFT adapts in no model of this family."""
    head = base.head_paths()
    return tuple(site for site in base.sites if site.path not in head and not refused_by_peft(base.model, site.name))


def adapted_by_default(base: Base) -> tuple[Site, ...]:
    """`all_linear`; in a base without such layers, as a convolutional net, its convolutions that are not in groups."""
    head = base.head_paths()
    convolutions = [site for site in base.every_site if site.kind == "convolution" and site.groups == 1]
    return all_linear(base) or tuple(site for site in convolutions if site.path not in head)


def reached(base: Base, sites: Iterable[Site]) -> str:
    """What share of the base's parameters these sites hold, what types of modules hold much that is adapted only where
    it is named, as experts are, and what types hold much that no adapter can act on."""
    reach = base.reach(sites)
    words = f"the adapted layers hold {100 * reach.share:.1f} % of the base's parameters"
    for what, shares in (("adapted only by name", reach.unnamed), ("out of an adapter's reach", reach.missed)):
        large = [f"{100 * share:.1f} % in {name}" for name, share in shares if share >= WORTH_TELLING]
        words += f"; {what} are {', '.join(large)}" if large else ""
    return words


def experts_per_token(base: Base) -> int:
    """How many experts of a mixture of experts each token is given to; 1 where the base does not say."""
    config = base.model.config.get_text_config() if isinstance(base.model, PreTrainedModel) else None
    used = getattr(config, "num_experts_per_tok", None)
    return used if isinstance(used, int) and used > 0 else 1


def hidden_size(base: Base) -> int:
    """Width of the stream between blocks: the most common input width of the sites."""
    widths = [site.d_in for site in adapted_by_default(base)]
    return max(set(widths), key=lambda width: (widths.count(width), -width))


def decide(base: Base, rows: Sequence[Row], settings: TrainSettings, seen: frozenset[str] | None = None) -> Decision:
    """Resolve every number of a run from base, training rows and settings.

    seen: paths of the sites that can learn from the rows (`fired`); the rules choose only among them.
    None takes all for granted.
    """
    if not base.every_site:
        raise BaseError(f"'{base.name}' has no layer of a kind that can be adapted: choose another base")
    if settings.targets is not None:
        candidates = _named(base, settings.targets)
    else:
        candidates = tuple(site for site in adapted_by_default(base) if seen is None or site.path in seen)
    if not candidates:
        raise BaseError(
            f"no layer of '{base.name}' that can be adapted takes part in a forward over your rows: choose another base"
        )
    rank, rank_choice = _rank(base, candidates, rows, settings, "labels" if base.head else "trained tokens")
    sites, sites_choice = _sites(base, candidates, rank, settings)
    heads = [(path, base.model.get_submodule(path)) for path in base.head]
    whole = tuple(Whole(path, tuple((n, tuple(p.shape)) for n, p in head.named_parameters())) for path, head in heads)
    plan = replace(uniform(sites, rank, settings.alpha, settings.variant), whole=whole)
    used = experts_per_token(base)
    if settings.rank is None and used > 1 and any(site.count > 1 for site in sites):
        low = max(1, rank // used)
        slots = tuple(replace(slot, rank=low) if slot.site.count > 1 else slot for slot in plan.slots)
        plan = replace(plan, slots=slots)
        shared = f"of each expert {low}, for a token takes {used} of them"
        rank_choice = replace(rank_choice, reason=f"{rank_choice.reason}; {shared}")
    if settings.weight_decay and any(not one.trained for slot in plan.slots for one in slot.factors().values()):
        raise SettingsError(
            f"--weight-decay {settings.weight_decay:g}: with {settings.variant} it would take the base's own largest "
            "directions out: leave it 0"
        )
    rate, rate_choice = _rate(base, settings)
    recipe, run_choices = _recipe(len(rows), rate, settings, classifies=bool(base.head))
    size = Choice(
        "adapter",
        f"{plan.parameters:,} parameters, {plan.bytes / 1e6:.1f} MB",
        f"{100 * plan.parameters / sum(p.numel() for p in base.model.parameters()):.1f} % of the base, "
        "which stays as it is",
        "",
    )
    passes = recipe.steps > math.ceil(len(rows) / recipe.batch_size)
    if settings.trunk_gb and (told := _trunk(base, plan, passes, settings)):
        run_choices.append(told)
    return Decision(plan, recipe, (sites_choice, rank_choice, size, rate_choice, *run_choices))


def _trunk(base: Base, plan: Plan, passes: bool, settings: TrainSettings) -> Choice | None:
    below, free = blocks_below(base, plan), free_blocks(base, plan)
    if base.head:
        return None
    if passes and free:
        reason = "they lie below every site: computed once, then read from disk in later epochs"
        return Choice("trunk", f"the lowest {free} blocks", reason, "--trunk-gb")
    if passes and below:
        reason = "this family does not declare that it can start above the blocks below every site"
        return Choice("trunk", "not available", f"{reason} ({below}): they are computed in every epoch", "")
    if settings.trunk_gb != TrainSettings().trunk_gb:
        why = "no block lies below every site" if not below else "one pass over the examples would never read it"
        return Choice("trunk", "not kept", why, "--trunk-gb")
    return None


def _sites(
    base: Base, candidates: tuple[Site, ...], rank: int, settings: TrainSettings
) -> tuple[tuple[Site, ...], Choice]:
    if settings.targets is not None:
        reason = f"named: {', '.join(settings.targets)}; {reached(base, candidates)}"
        if settings.dropout and any(site.count > 1 for site in candidates):
            reason += "; dropout does not act on the experts"
        return candidates, Choice("sites", str(len(candidates)), reason, "--targets")
    sites = tuple(site for site in candidates if min(site.d_in, site.d_out) >= rank)
    if not sites:
        widest = max(min(site.d_in, site.d_out) for site in candidates)
        raise SettingsError(f"--rank {rank}: larger than every layer of '{base.name}': choose 1 to {widest}")
    names = ", ".join(dict.fromkeys(site.name for site in sites))
    what = "linear layers of the blocks" if all_linear(base) else "convolutions that are not in groups"
    reason = f"all {what} ({names}): a good default if nothing is known about the task"
    if silent := len(adapted_by_default(base)) - len(candidates):
        reason += f"; {silent} more take no part in a forward over your rows, or get no gradient"
    if narrow := len(candidates) - len(sites):
        reason += f"; {narrow} more are narrower than the rank"
    reason += f"; {reached(base, sites)}"
    if any(site.count > 1 for site in base.every_site):
        named = ",".join(dict.fromkeys([*(site.name for site in sites), "experts"]))
        reason += f"; --targets {named} adapts the experts too, and such an adapter is not served to many at once"
    return sites, Choice("sites", str(len(sites)), reason, "--targets")


def _rank(
    base: Base, sites: Sequence[Site], rows: Sequence[Row], settings: TrainSettings, what: str
) -> tuple[int, Choice]:
    if settings.rank is not None:
        return settings.rank, Choice("rank", str(settings.rank), "set by you", "--rank")
    tokens = sum(row.n_trained for row in rows)
    per_rank = sum(site.per_rank // min(site.count, experts_per_token(base)) for site in sites)
    trimmed = settings.trim == "auto" and all(
        slot.is_pair for slot in uniform(sites, 1, settings.alpha, settings.variant).slots
    )
    least = TRIMMED_RANK if trimmed else SMALLEST_RANK
    rank = rank_by_capacity(tokens, per_rank, least)
    # A gate of one output is no reason to give every other layer rank 1: where no site is named, it stays out. Keys and
    # values that share heads are narrow too, and stay in: they are more than a quarter of the sites.
    widths = sorted(min(site.d_in, site.d_out) for site in sites)
    fitting = min(rank, widths[len(widths) // 4] if settings.targets is None else widths[0])
    reason = f"{tokens:,} {what}, {per_rank:,} parameters per unit of rank: twice what holds them, at least {least}"
    reason += ", for it is trimmed afterwards" if trimmed else ""
    reason += f", and no more than the layers hold ({fitting})" if fitting < rank else ""
    return fitting, Choice("rank", f"{fitting} (alpha {settings.alpha:g})", reason, "--rank, --alpha")


def _named(base: Base, targets: Sequence[str]) -> tuple[Site, ...]:
    """The sites that targets name; what is no product, such as an embedding, by its name alone and by no pattern. The
    head of a classifier is none: it is trained whole. Raises TargetError, by their types where targets name modules
    that no adapter acts on."""
    plain = [target for target in targets if "*" not in target]
    others = [site for site in base.every_site if not KINDS[site.kind].is_product]
    named = {site.path for site in others if any(matches(site, target) for target in plain)}
    open_to = [
        site
        for site in base.every_site
        if site.path not in base.head and (KINDS[site.kind].is_product or site.path in named)
    ]
    known = {path for site in base.every_site for path in (site.path, site.module, site.key.removesuffix(".weight"))}
    refused = [
        f"{path}: torch.nn.{type(module).__name__} is not adapted: leave it out of --targets"
        for path, module in base.model.named_modules()
        if path not in known
        and type(module).__module__.startswith("torch.nn.")
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        and any(matches(Site(path, "", 0, 0), target) for target in plain)
    ]
    if isinstance(base.model, PreTrainedModel) and base.model.can_generate():  # as Mamba does with its state at hand
        refused += [
            f"{site.path}: a language model may read this convolution past its forward as it writes, and so past an "
            "adapter: leave it out of --targets"
            for site in base.every_site
            if is_state(site) and site.path in named
        ]
    if refused:
        raise TargetError("\n".join(refused))
    return select(open_to, targets)


def is_state(site: Site) -> bool:
    """Whether it is a convolution along the text with a kernel for each channel, of whose inputs a language model may
    keep the last ones. Those of images and sounds are none: they lie along two dimensions, or take all channels."""
    return site.kind == "convolution" and len(site.form) == 2 and site.groups > 1


def _rate(base: Base, settings: TrainSettings) -> tuple[float, Choice]:
    if settings.learning_rate is not None:
        rate, reason = settings.learning_rate, "set by you"
    else:
        hidden = hidden_size(base)
        rate = learning_rate_by_width(hidden)
        reason = f"by width: 5e-4 · (2000 / {hidden})^0.781 at alpha 32"
        if base.head:
            rate, reason = LABEL_RATE * rate, f"{reason}, a third of it for a classifier"
        if settings.alpha != 32:
            reason += f"; you set alpha {settings.alpha:g}: the rule is not fitted for it"
        if VARIANTS[settings.variant].scaling(1.0, 4) != 1 / 4:
            reason += f"; the scale of {settings.variant} is larger than LoRA's: a lower rate may be better"
    return rate, Choice("learning rate", f"{rate:.1e}", reason + "; warms up, then falls to zero", "--learning-rate")


def _recipe(n: int, rate: float, settings: TrainSettings, classifies: bool) -> tuple[Recipe, list[Choice]]:
    by_rule = next(size for size, below in BATCHES if n < below)
    asked = settings.batch_size or (max(LABEL_BATCH, by_rule) if classifies else by_rule)
    wanted = LABEL_STEPS if classifies else STEPS_WANTED
    batch = min(asked, n)
    if settings.epochs is not None:
        epochs, why = settings.epochs, "set by you"
    else:
        epochs = min(MOST_EPOCHS, max(1.0, wanted * batch / n))
        why = f"as many passes over the data as {wanted} steps need"
        if epochs == MOST_EPOCHS:
            why = f"{MOST_EPOCHS:g} passes, the most by rule; {n} examples are few for the {wanted} steps wanted"
        elif epochs == 1:
            why = f"one pass, the least by rule, is more than the {wanted} steps wanted"
    steps = round(epochs * math.ceil(n / batch))
    if steps < 1:
        raise SettingsError(f"--epochs {epochs:g} over {n} examples in batches of {batch} is not one step: raise it")
    every = max(1, -(-steps // settings.validations))
    recipe = Recipe(
        learning_rate=rate,
        batch_size=batch,
        steps=steps,
        warmup=max(1, round(settings.warmup * steps)),
        validate_every=every,
        patience=settings.patience,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        seed=settings.seed,
    )
    set_batch = "set by you" if settings.batch_size else "small batches give more steps, large ones are faster"
    if classifies and not settings.batch_size:
        set_batch = "the gradient of a few labels is mostly noise"
    if batch < asked:
        set_batch += f", and there are but {n}"
    return recipe, [
        Choice("batch", f"{batch} examples", set_batch, "--batch-size"),
        Choice("steps", f"{steps} ({epochs:.3g} × {n:,} examples)", why, "--epochs"),
        Choice(
            "validation",
            f"every {every} steps" + (f" and after {recipe.early}" if recipe.early else ""),
            "the state with the lowest validation NLL is kept",
            "--validations, --patience",
        ),
    ]
