"""Explains a run in sentences: the measurements, the choices, the alternatives, and how certain they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.planning.signal import block_of, kinds_of
from lorafit.report.story import Story

SHOWN = 3  # the most parts that are named


def why(story: Story) -> list[tuple[str, str]]:
    """(heading, sentences) for every part of the run that is done."""
    told = [
        ("What these data can show", _evidence(story)),
        ("The search: learning rate and layers", _search(story)),
        ("Which layers the first gradients agree on", _card(story)),
        ("Which layers mattered", _importance(story)),
        ("How small the adapter can be", _ladder(story)),
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
            f"There are {n} independent validation examples, too few to base a choice on. All choices rest on rules "
            "that worked on other data."
        )
    share = card["detectable"] / card["nll"]
    return (
        f"Every choice was made on validation examples, {n} of which are independent of each other. The base's NLL on "
        f"them is {card['nll']:.3f}. With so many examples, a difference of {card['detectable']:.3f} between two "
        f"models ({share:.0%} of that NLL) is detected in four cases of five. This is a cautious estimate: it assumes "
        "that the difference varies from example to example as much as the NLL, and usually it varies far less. With "
        "four times as many examples, half that difference would be detected."
    )


def _search(story: Story) -> str:
    if not story.tried:
        said = [choice for choice in (story.plan or {}).get("choices", ()) if choice["name"] == "search"]
        return f"There was no search for learning rate or layers: {said[0]['reason']}." if said else ""
    sentences = []
    for what, kind in (("rate", "learning rates"), ("place", "choices of layers and ranks")):
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
            sentences.append(f"Chosen: {choice['value']}, {choice['reason']}.")
    sentences.append("Short runs favour high rates, so of rates that validation cannot separate, the lower is chosen.")
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
        return "The first gradients are only noise, so nothing can be said of the layers before training."
    return (
        f"Before training, {card['batches']} gradients over {card['rows']} examples were compared. A layer has a "
        f"strong signal if its gradients agree. By kind of layer, most of the signal is in "
        f"{_top(_by_name(energies), whole)}; by depth, in {_top(_by_block(energies), whole)}. This shows where "
        "learning would begin, not where it ends. A search uses it to choose which layers to try, and validation "
        "decides between them."
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
    sentences = [f"After training, the adapter was scored on {n} validation examples with parts of it removed."]
    if names:
        sentences.append(f"By kind of layer, the NLL rises most if one removes {_rises(names)}.")
    if blocks:
        idle = sum(one["rise"] <= 0 for one in blocks)
        sentences.append(f"By block, it rises most without {_rises(blocks)}.")
        sentences.append(f"{idle} of {len(blocks)} blocks could be removed, each alone, without a rise.")
    sentences.append("Parts can replace each other, so these numbers do not add up.")
    return " ".join(sentences)


def _rises(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['name']} ({one['rise']:+.3f}{_ends(one['ci95'])})" for one in found[:SHOWN])


def _ends(ci95: Sequence[float] | None) -> str:
    return f", 95 % {ci95[0]:+.3f} to {ci95[1]:+.3f}" if ci95 else ""


def _ladder(story: Story) -> str:
    ladder = story.summary.ladder if story.summary else None
    if not ladder:
        return ""
    if ladder["chosen"] == 1:
        return f"It was not trimmed: {ladder['reason'].removeprefix('untrimmed: ').removeprefix('untrimmed, ')}."
    return (
        f"{100 * ladder['chosen']:.3g} % of the adapter's parameters were kept: {ladder['reason']}. The directions "
        "that do least per parameter were removed first, so ranks now differ between layers. The run still has the "
        "whole adapter; lorafit trim makes another size."
    )


def _rounds(story: Story) -> str:
    if not story.summary or not story.summary.rounds:
        return ""
    rounds, tested = story.summary.rounds, story.summary.scores_of_round
    told = [f"Round {one['number']}, {one['kind']}, for {one['reason']}: {one['verdict']}." for one in rounds]
    told.append("Each was judged on validation, by a stricter test than the one before.")
    if tested is not None:
        told.append(
            f"The test scores above are of the adapter before round {tested}; the test was not opened again. lorafit "
            "eval on new examples scores the current adapter."
        )
    return " ".join(told)


def _forgetting(story: Story) -> str:
    sentences = []
    for source, score in (story.summary.forgotten if story.summary else {}).items():
        ends = score.ci95
        sure = "" if ends is None else f" (95 % {ends[0]:+.3f} to {ends[1]:+.3f})"
        sentences.append(
            f"On general text ({source}) the NLL goes from {score.base:.3f} to {score.adapter:.3f} with the "
            f"adapter, {score.difference:+.3f}{sure}: {_lost(ends)}."
        )
    return " ".join(sentences)


def _lost(ends: Sequence[float] | None) -> str:
    if ends is None:
        return "too few paragraphs to tell whether anything was forgotten"
    if ends[1] < 0:
        return "nothing was forgotten there, and it became better"
    return "something was forgotten" if ends[0] > 0 else "forgetting is not shown"


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
