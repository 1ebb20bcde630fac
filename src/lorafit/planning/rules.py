"""The rules that choose the numbers of a run before training.

Rank: at least as many LoRA parameters as trained tokens (Tinker primer). Learning rate: 5e-4 · (2000 / hidden)^0.781 at
alpha 32, which tinker-cookbook fitted to a public sweep of models. The rate is unproven below 1B parameters; here it
measured well at 135M.
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

# A run that trims its adapter afterwards starts with a higher rank than it needs: in short runs, rank 32 was better
# than 8 at an equal rate (bench/planning.py).
SMALLEST_RANK, TRIMMED_RANK, LARGEST_RANK = 8, 32, 64
# The product of steps and rate decides how much is learnt, so small data sets get small batches. With equal tokens,
# batches of 4 instead of 8 raised the accuracy on the built-in handbook from 85 to 92 %.
BATCHES = ((4, 2_000), (8, 8_000), (16, 32_000), (32, math.inf))
STEPS_WANTED, MOST_EPOCHS = 450, 3.0
# A label carries less information than an answer. On 800 film reviews a classifier learnt nothing at the full rate in
# batches of 8; at a third of it, in batches of 16, it got four in five right, best after 40 to 120 steps (docs/log.md).
LABEL_RATE, LABEL_BATCH, LABEL_STEPS = 1 / 3, 16, 250
REPORTED_SHARE = 0.01  # types of modules with at least this share of the base's parameters are named in messages


@dataclass(frozen=True)
class Choice:
    """One number or setting of a run.

    Args:
        name: What was chosen, such as `rank`.
        value: The value, in words.
        reason: The reason, in a sentence.
        flag: The flag that sets another value; empty if there is none.
    """

    name: str
    value: str
    reason: str
    flag: str


@dataclass(frozen=True)
class Decision:
    """All numbers of a run.

    Args:
        plan: The sites, their ranks and their methods.
        recipe: How the plan is trained.
        choices: The choices behind both, with their reasons.
    """

    plan: Plan
    recipe: Recipe
    choices: tuple[Choice, ...]


def with_choice(decision: Decision, name: str, value: str, reason: str, flag: str = "") -> Decision:
    """The decision with the choice of this name replaced, or added at the end. Without a flag the old one is kept."""
    old = next((choice for choice in decision.choices if choice.name == name), None)
    new = Choice(name, value, reason, flag or (old.flag if old else ""))
    if old is None:
        return replace(decision, choices=(*decision.choices, new))
    return replace(decision, choices=tuple(new if choice is old else choice for choice in decision.choices))


def with_rank(decision: Decision, reason: str) -> Decision:
    """The decision with the choices of rank and adapter size updated from its plan."""
    plan = decision.plan
    ranks = sorted({slot.rank for slot in plan.slots})
    value = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    decision = with_choice(decision, "rank", f"{value} (alpha {plan.slots[0].alpha:g})", reason)
    return with_choice(decision, "adapter", f"{plan.parameters:,} parameters, {plan.bytes / 1e6:.1f} MB", reason)


def rank_by_capacity(trained_tokens: int, per_rank: int, least: int = SMALLEST_RANK) -> int:
    """The smallest power of two that is at least 2 · ceil(trained_tokens / per_rank), between `least` and LARGEST_RANK.

    Args:
        trained_tokens: The trained tokens of all training rows.
        per_rank: The parameters of all sites per unit of rank.
        least: The smallest result.
    """
    needed = 2 * math.ceil(trained_tokens / per_rank)
    return min(LARGEST_RANK, max(least, 1 << math.ceil(math.log2(max(1, needed)))))


def learning_rate_by_width(hidden: int) -> float:
    """5e-4 · (2000 / hidden)^0.781, rounded to two digits; for alpha 32."""
    return float(f"{5e-4 * (2000 / hidden) ** 0.781:.1e}")


def all_linear(base: Base) -> tuple[Site, ...]:
    """Every linear layer of the base, except its output head and layers that PEFT cannot adapt in this family."""
    head = base.head_paths()
    return tuple(site for site in base.sites if site.path not in head and not refused_by_peft(base.model, site.name))


def adapted_by_default(base: Base) -> tuple[Site, ...]:
    """The result of `all_linear`; in a base without such layers, its convolutions that have no groups."""
    head = base.head_paths()
    convolutions = [site for site in base.every_site if site.kind == "convolution" and site.groups == 1]
    return all_linear(base) or tuple(site for site in convolutions if site.path not in head)


def reached(base: Base, sites: Iterable[Site]) -> str:
    """A sentence on the share of the base's parameters that these sites hold, and the types of modules that hold a
    large share but are adapted only if they are named (such as experts), or cannot be adapted."""
    reach = base.reach(sites)
    text = f"the adapted layers hold {100 * reach.share:.1f} % of the base's parameters"
    for what, shares in (("adapted only if named", reach.unnamed), ("out of an adapter's reach", reach.missed)):
        large = [f"{100 * share:.1f} % in {name}" for name, share in shares if share >= REPORTED_SHARE]
        text += f"; {what}: {', '.join(large)}" if large else ""
    return text


def experts_per_token(base: Base) -> int:
    """The number of experts that each token uses; 1 if the base has no experts or does not say."""
    config = base.model.config.get_text_config() if isinstance(base.model, PreTrainedModel) else None
    used = getattr(config, "num_experts_per_tok", None)
    return used if isinstance(used, int) and used > 0 else 1


def hidden_size(base: Base) -> int:
    """The width of the hidden states: the most common input width of the sites."""
    widths = [site.d_in for site in adapted_by_default(base)]
    return max(set(widths), key=lambda width: (widths.count(width), -width))


def decide(
    base: Base,
    rows: Sequence[Row],
    settings: TrainSettings,
    seen: frozenset[str] | None = None,
    set_by: str = "you",
) -> Decision:
    """Choose every number of a run.

    Args:
        base: The base.
        rows: The training rows.
        settings: The settings. The rules choose only what these leave open.
        seen: The paths of the sites that can learn from the rows, as `fired` finds them; the rules choose only among
            these. None to assume that all can.
        set_by: Who set the settings, for the reasons.

    Raises:
        BaseError: If no layer of the base can be adapted, or none takes part in a forward over the rows.
        SettingsError: If a setting does not fit the base or the data.
        TargetError: If a target names no site.
    """
    if not base.every_site:
        raise BaseError(f"'{base.name}' has no layer that can be adapted: choose another base")
    if settings.targets is not None:
        candidates = _named(base, settings.targets)
    else:
        candidates = tuple(site for site in adapted_by_default(base) if seen is None or site.path in seen)
    if not candidates:
        raise BaseError(
            f"no layer of '{base.name}' that can be adapted takes part in a forward over your rows: choose another base"
        )
    rank, rank_choice = _rank(base, candidates, rows, settings, set_by)
    sites, sites_choice = _sites(base, candidates, rank, settings)
    heads = [(path, base.model.get_submodule(path)) for path in base.head]
    whole = tuple(Whole(path, tuple((n, tuple(p.shape)) for n, p in head.named_parameters())) for path, head in heads)
    plan = replace(uniform(sites, rank, settings.alpha, settings.variant), whole=whole)
    used = experts_per_token(base)
    if settings.rank is None and used > 1 and any(site.count > 1 for site in sites):
        low = max(1, rank // used)
        slots = tuple(replace(slot, rank=low) if slot.site.count > 1 else slot for slot in plan.slots)
        plan = replace(plan, slots=slots)
        of_experts = f"{low} for each expert, because a token uses {used} of them"
        rank_choice = replace(rank_choice, reason=f"{rank_choice.reason}; {of_experts}")
    if settings.weight_decay and any(not factor.trained for slot in plan.slots for factor in slot.factors().values()):
        raise SettingsError(
            f"--weight-decay {settings.weight_decay:g}: with {settings.variant} it would remove the base's own largest "
            "directions: leave it 0"
        )
    rate, rate_choice = _rate(base, settings, set_by)
    recipe, run_choices = _recipe(len(rows), rate, settings, bool(base.head), set_by)
    size = Choice(
        "adapter",
        f"{plan.parameters:,} parameters, {plan.bytes / 1e6:.1f} MB",
        f"{100 * plan.parameters / sum(p.numel() for p in base.model.parameters()):.1f} % of the base, "
        "which stays as it is",
        "",
    )
    passes = recipe.steps > math.ceil(len(rows) / recipe.batch_size)
    if settings.trunk_gb and (trunk := _trunk(base, plan, passes, settings)):
        run_choices.append(trunk)
    return Decision(plan, recipe, (sites_choice, rank_choice, size, rate_choice, *run_choices))


def _trunk(base: Base, plan: Plan, passes: bool, settings: TrainSettings) -> Choice | None:
    below, free = blocks_below(base, plan), free_blocks(base, plan)
    if base.head:
        return None
    if passes and free:
        reason = "they lie below every site: their output is computed once and read from disk in later epochs"
        return Choice("trunk", f"the lowest {free} blocks", reason, "--trunk-gb")
    if passes and below:
        reason = f"lorafit cannot skip blocks in this family of models: the lowest blocks ({below}) run in each epoch"
        return Choice("trunk", "not available", reason, "")
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
    what = "linear layers of the blocks" if all_linear(base) else "convolutions without groups"
    reason = f"all {what} ({names}): a good default if nothing is known about the task"
    if silent := len(adapted_by_default(base)) - len(candidates):
        reason += f"; {silent} more take no part in a forward over your rows, or receive no gradient"
    if narrow := len(candidates) - len(sites):
        reason += f"; {narrow} more are narrower than the rank"
    reason += f"; {reached(base, sites)}"
    if any(site.count > 1 for site in base.every_site):
        named = ",".join(dict.fromkeys([*(site.name for site in sites), "experts"]))
        reason += f"; --targets {named} adapts the experts too, but such an adapter is not served together with others"
    return sites, Choice("sites", str(len(sites)), reason, "--targets")


def _rank(
    base: Base, sites: Sequence[Site], rows: Sequence[Row], settings: TrainSettings, set_by: str
) -> tuple[int, Choice]:
    if settings.rank is not None:
        return settings.rank, Choice("rank", str(settings.rank), f"set by {set_by}", "--rank")
    tokens = sum(row.n_trained for row in rows)
    what = "labels" if base.head else "trained tokens"
    per_rank = sum(site.per_rank // min(site.count, experts_per_token(base)) for site in sites)
    trimmed = settings.trim == "auto" and all(
        slot.is_pair for slot in uniform(sites, 1, settings.alpha, settings.variant).slots
    )
    least = TRIMMED_RANK if trimmed else SMALLEST_RANK
    rank = rank_by_capacity(tokens, per_rank, least)
    # A gate with one output must not give all other layers rank 1, so the narrowest sites are left out if no sites are
    # named. Keys and values with shared heads are narrow too, but they are more than a quarter of the sites and stay.
    widths = sorted(min(site.d_in, site.d_out) for site in sites)
    fitting = min(rank, widths[len(widths) // 4] if settings.targets is None else widths[0])
    reason = f"for {tokens:,} {what} at {per_rank:,} parameters per unit of rank, with a factor of 2; at least {least}"
    reason += ", because the adapter is trimmed afterwards" if trimmed else ""
    reason += f", but at most {fitting}, the width of the narrower layers" if fitting < rank else ""
    return fitting, Choice("rank", f"{fitting} (alpha {settings.alpha:g})", reason, "--rank, --alpha")


def _named(base: Base, targets: Sequence[str]) -> tuple[Site, ...]:
    """The sites that targets name.

    A layer that is not linear, such as an embedding, must be named without a pattern. The head of a classifier is not
    among the sites, because it is trained whole. Raises TargetError if a target matches no site, or names a module that
    cannot be adapted.
    """
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
    if isinstance(base.model, PreTrainedModel) and base.model.can_generate():  # Mamba does this when it has a state
        refused += [
            f"{site.path}: a language model may read the weight of this convolution without calling it when it writes, "
            "and would ignore an adapter: leave it out of --targets"
            for site in base.every_site
            if is_state(site) and site.path in named
        ]
    if refused:
        raise TargetError("\n".join(refused))
    return select(open_to, targets)


def is_state(site: Site) -> bool:
    """Whether the site is a convolution along the text with a kernel per channel. A language model may keep the last
    inputs of such a convolution, and then reads its weight without calling it. Convolutions of images and sound lie
    along two dimensions, or take all channels."""
    return site.kind == "convolution" and len(site.form) == 2 and site.groups > 1


def _rate(base: Base, settings: TrainSettings, set_by: str) -> tuple[float, Choice]:
    if settings.learning_rate is not None:
        rate, reason = settings.learning_rate, f"set by {set_by}"
    else:
        hidden = hidden_size(base)
        rate = learning_rate_by_width(hidden)
        reason = f"by width: 5e-4 · (2000 / {hidden})^0.781 at alpha 32"
        if base.head:
            rate, reason = LABEL_RATE * rate, f"{reason}, a third of it for a classifier"
        if settings.alpha != 32:
            reason += f"; the rule was not fitted for alpha {settings.alpha:g}, which {set_by} set"
        if VARIANTS[settings.variant].scaling(1.0, 4) != 1 / 4:
            reason += f"; the scale of {settings.variant} is larger than LoRA's, so a lower rate may be better"
    return rate, Choice("learning rate", f"{rate:.1e}", reason + "; warms up, then falls to zero", "--learning-rate")


def _recipe(n: int, rate: float, settings: TrainSettings, classifies: bool, set_by: str) -> tuple[Recipe, list[Choice]]:
    by_rule = next(size for size, below in BATCHES if n < below)
    asked = settings.batch_size or (max(LABEL_BATCH, by_rule) if classifies else by_rule)
    wanted = LABEL_STEPS if classifies else STEPS_WANTED
    batch = min(asked, n)
    if settings.epochs is not None:
        epochs, why = settings.epochs, f"set by {set_by}"
    else:
        epochs = min(MOST_EPOCHS, max(1.0, wanted * batch / n))
        why = f"as many passes over the data as {wanted} steps need"
        if epochs == MOST_EPOCHS:
            why = f"{MOST_EPOCHS:g} passes, the most by rule; for {wanted} steps there would have to be more examples"
        elif epochs == 1:
            why = f"one pass, the least by rule; {wanted} steps would have been enough"
    steps = round(epochs * math.ceil(n / batch))
    if steps < 1:
        raise SettingsError(
            f"--epochs {epochs:g}: with {n} examples in batches of {batch} this is less than one step: raise it"
        )
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
    if settings.batch_size:
        why_batch = f"set by {set_by}"
    elif classifies:
        why_batch = "the gradient of a few labels is mostly noise"
    else:
        why_batch = "small batches give more steps, large ones are faster"
    if batch < asked:
        why_batch += f", but there are only {n}"
    return recipe, [
        Choice("batch", f"{batch} examples", why_batch, "--batch-size"),
        Choice("steps", f"{steps} ({epochs:.3g} × {n:,} examples)", why, "--epochs"),
        Choice(
            "validation",
            f"every {every} steps" + (f" and after {recipe.early}" if recipe.early else ""),
            "the state with the lowest validation NLL is kept",
            "--validations, --patience",
        ),
    ]
