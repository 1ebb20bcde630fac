"""A run in sentences: what was measured, what was chosen, what the alternatives would have cost, how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.planning.signal import block_of, kinds_of
from lorafit.report.story import Story

SHOWN = 3  # parts that are named of many


def why(story: Story) -> list[tuple[str, str]]:
    """(heading, sentences) of whatever the run has come to."""
    told = [
        ("What these data can show", _evidence(story)),
        ("Learning rate and places: the search", _search(story)),
        ("Which layers the data pull at", _card(story)),
        ("Which layers mattered", _importance(story)),
        ("How small it may be", _ladder(story)),
        ("What further rounds have brought", _rounds(story)),
        ("What was forgotten", _forgetting(story)),
    ]
    return [(heading, text) for heading, text in told if text]


def _evidence(story: Story) -> str:
    card = story.card
    if not card:
        return ""
    n = card["independent"]
    if card["detectable"] is None:
        return (
            f"There are {n} independent validation examples, too few to choose by: what was decided rests on rules "
            "that held for other data."
        )
    share = card["detectable"] / card["nll"]
    return (
        f"Every choice was made on validation examples, of which there are {n} that are independent of each other. The "
        f"base's NLL on them is {card['nll']:.3f}. Differences between two models of {card['detectable']:.3f} "
        f"({share:.0%} of it) would be noticed four times in five even if they varied from example to example as much "
        "as the NLL itself; they usually vary far less, so smaller ones are seen too. Four times as many examples "
        "would halve that."
    )


def _search(story: Story) -> str:
    if not story.tried:
        said = [choice for choice in (story.plan or {}).get("choices", ()) if choice["name"] == "search"]
        return f"Nothing was searched: {said[0]['reason']}." if said else ""
    sentences = []
    for what, kind in (("rate", "learning rates"), ("place", "places and ranks")):
        arms = [arm for arm in story.tried if arm["cell"].startswith(f"{what}-")]
        if not arms:
            continue
        first = [arm for arm in arms if arm["cell"].startswith(f"{what}-1-")]
        ends = [(arm["name"].removeprefix("rate "), _mean(arm["each"])) for arm in first]
        listed = "; ".join(f"{name}: {'diverged' if nll is None else f'{nll:.3f}'}" for name, nll in ends)
        sentences.append(
            f"{len(first)} {kind} were tried, each in a short run of {first[0]['steps']} steps from the start, and "
            f"compared on the same {_count(first)} validation examples (NLL at the end, lower is better: {listed})."
        )
    choices = {choice["name"]: choice for choice in (story.plan or {}).get("choices", ())}
    for name in ("learning rate", "sites"):
        if (choice := choices.get(name)) and "searched" in choice["reason"]:
            sentences.append(f"Taken: {choice['value']}, {choice['reason']}.")
    sentences.append("Short runs favour high rates, so where validation could not tell two apart the lower was taken.")
    return " ".join(sentences)


def _mean(each: Sequence[float] | None) -> float | None:
    return sum(each) / len(each) if each else None


def _count(arms: Sequence[Mapping[str, Any]]) -> int:
    return max((len(arm["each"]) for arm in arms if arm["each"]), default=0)


def _card(story: Story) -> str:
    if not story.card or "sites" not in story.card:
        return ""
    card = story.card
    energies = {one["path"]: max(0.0, one["energy"]) for one in card["sites"]}
    whole = sum(energies.values())
    if not whole:
        return "The first gradients are but noise: before training nothing could be said of the layers."
    return (
        f"Before training, {card['batches']} gradients over {card['rows']} examples were compared: where they agree, "
        f"the data pull. Most of it lies in {_top(_by_name(energies), whole)}; by depth, in "
        f"{_top(_by_block(energies), whole)}. This says where learning would begin, not where it ends: it decides "
        "which places are worth trying, and validation decides between them."
    )


def _importance(story: Story) -> str:
    if not story.importance:
        return ""
    found = sorted(story.importance["ablations"], key=lambda one: -one["rise"])
    if not found:
        return ""
    n = story.importance["examples"]
    blocks = [one for one in found if one["name"].startswith("block ")]
    names = [one for one in found if not one["name"].startswith("block ")]
    sentences = [f"After training, the adapter was scored on {n} validation examples with parts of it taken away."]
    if names:
        sentences.append(f"Of the kinds of layer, the NLL rises most without {_rises(names)}.")
    if blocks:
        idle = sum(one["rise"] <= 0 for one in blocks)
        sentences.append(f"Of the blocks, without {_rises(blocks)}; {idle} of {len(blocks)} could be missed singly.")
    sentences.append("Parts stand in for each other, so these numbers do not add up.")
    return " ".join(sentences)


def _rises(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['name']} ({one['rise']:+.3f}{_ends(one['ci95'])})" for one in found[:SHOWN])


def _ends(ci95: Sequence[float] | None) -> str:
    return f", 95 % {ci95[0]:+.3f} to {ci95[1]:+.3f}" if ci95 else ""


def _ladder(story: Story) -> str:
    ladder = (story.summary or {}).get("ladder")
    if not ladder:
        return ""
    if ladder["chosen"] == 1:
        return f"The adapter is whole: {ladder['reason'].removeprefix('untrimmed: ').removeprefix('untrimmed, ')}."
    return (
        f"Of the adapter's parameters {ladder['chosen']:.4g} are shipped: {ladder['reason']}. The directions that do "
        "least for each parameter went first, so ranks now differ from layer to layer. The whole is kept in the run: "
        "lorafit trim takes another rung."
    )


def _rounds(story: Story) -> str:
    rounds = (story.summary or {}).get("rounds")
    if not rounds:
        return ""
    told = [f"Round {one['number']}, {one['kind']}, for {one['reason']}: {one['verdict']}." for one in rounds]
    told.append("Each was judged on validation by a test of its own, stricter than the one before.")
    tested = (story.summary or {}).get("scores_of_round")
    if tested is not None:
        told.append(
            f"The test scores above are those of the adapter before round {tested}: it was not opened again. "
            "lorafit eval on new examples scores the one that stands."
        )
    return " ".join(told)


def _forgetting(story: Story) -> str:
    lost = (story.summary or {}).get("forgetting")
    if not lost:
        return ""
    sentences = []
    for source, score in lost["general"].items():
        ends = score["ci95"]
        sure = "" if ends is None else f" (95 % {ends[0]:+.3f} to {ends[1]:+.3f})"
        sentences.append(
            f"On general text ({source}) the NLL goes from {score['base']:.3f} to {score['adapter']:.3f} with the "
            f"adapter, {score['difference']:+.3f}{sure}: {_lost(ends)}."
        )
    return " ".join(sentences)


def _lost(ends: Sequence[float] | None) -> str:
    if ends is None:
        return "too few paragraphs to tell whether anything is forgotten"
    if ends[1] < 0:
        return "nothing is forgotten there, it has become better"
    return "something is forgotten" if ends[0] > 0 else "not shown to be forgotten"


def _by_name(energies: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    kinds = kinds_of(list(energies))
    for path, energy in energies.items():
        found[kinds[path]] = found.get(kinds[path], 0.0) + energy
    return found


def _by_block(energies: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for path, energy in energies.items():
        name = f"block {block_of(path)}" if block_of(path) is not None else path
        found[name] = found.get(name, 0.0) + energy
    return found


def _top(energies: Mapping[str, float], whole: float) -> str:
    ranked = sorted(energies.items(), key=lambda item: -item[1])[:SHOWN]
    return ", ".join(f"{name} ({energy / whole:.0%})" for name, energy in ranked)
