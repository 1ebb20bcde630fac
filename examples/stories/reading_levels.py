"""One text for three classes: a sentence rewritten for elementary, intermediate or advanced learners of English.

    pip install 'lorafit[stories]'
    LORAFIT_DATA=... python examples/stories/reading_levels.py

Three adapters on one base, which stays as it is; docs/stories/reading_levels.md tells what comes out.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scores import gain, grade, mean, rouge_l, tokens, words
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from verbs import Stage, Story, story, table

SYSTEM = "Rewrite this sentence from a newspaper for a class that learns English."
LEVELS = ("elementary", "intermediate", "advanced")
FOLDERS = {"elementary": "Ele-Txt", "intermediate": "Int-Txt/Int-Txt", "advanced": "Adv-Txt"}
ALIGNED = {"ADV-ELE": (2, 0), "ADV-INT": (2, 1), "ELE-INT": (0, 1)}
MOST_ALIKE = 0.75  # of their words; pairs that share more are left out: there is too little to change
PIECE = 4  # sentences a level is recognised by in training

WRITERS = {
    "the sentence given": "source",
    "what people wrote": "reference",
    "base": "base",
    "base, 3 examples": "examples",
    "the level's adapter": None,
}

Rows = list[dict[str, str]]
Asked = Sequence[Mapping[str, Any]]  # each held-out pair with all answers to it


def squeezed(text: str) -> str:
    """Letters and digits alone: the aligned sentences have lost quotation marks and apostrophes."""
    return "".join(tokens(text))


def read(folder: Path) -> tuple[dict[str, Rows], dict[tuple[str, str], list[str]]]:
    """Pairs by the level they end in, as examples whose group is the article; every sentence by (article, level).

    Which article a pair comes from the corpus does not say: it is the one that holds one of the two sentences.
    """
    articles: dict[str, str] = defaultdict(str)
    for level in FOLDERS.values():
        for file in sorted((folder / "Texts-SeparatedByReadingLevel" / level).glob("*.txt")):
            name = file.stem.lower().rpartition("-")[0].strip()
            articles[name] += "|" + squeezed(file.read_text(encoding="utf-8-sig", errors="replace"))
    pairs: dict[str, Rows] = defaultdict(list)
    sentences: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file_name, sides in ALIGNED.items():
        one, other = (LEVELS[side] for side in sides)
        text = (folder / "Sentence-Aligned" / f"{file_name}.txt").read_text(encoding="utf-8-sig")
        for pair in re.split(r"^\*+\s*$", text, flags=re.MULTILINE):
            a, _, b = (side.strip() for side in pair.strip().partition("\n"))
            homes = [name for name, whole in articles.items() if squeezed(a) in whole or squeezed(b) in whole]
            if not (a and b) or len(homes) != 1:
                continue
            for level, sentence in ((one, a), (other, b)):
                if sentence not in sentences[homes[0], level]:
                    sentences[homes[0], level].append(sentence)
            if alike(a, b) <= MOST_ALIKE:
                pairs[other].append({"prompt": a, "completion": b, "group": homes[0]})
                pairs[one].append({"prompt": b, "completion": a, "group": homes[0]})
    return pairs, sentences


def alike(a: str, b: str) -> float:
    """Jaccard similarity of two sentences' words."""
    one, other = set(tokens(a)), set(tokens(b))
    return len(one & other) / len(one | other)


def pick(pairs: Iterable[dict[str, str]], articles: set[str], each: int) -> Rows:
    """Up to so many pairs of every article, drawn with a seed."""
    of: dict[str, Rows] = defaultdict(list)
    for pair in pairs:
        if pair["group"] in articles:
            of[pair["group"]].append(pair)
    rng = random.Random(0)
    return [pair for name in sorted(of) for pair in rng.sample(of[name], min(each, len(of[name])))]


def recogniser(sentences: dict[tuple[str, str], list[str]], articles: set[str]) -> Any:
    """Tells the level of a text of several sentences; learnt from what people wrote, never from an answer."""
    texts, levels = [], []
    for (article, level), own in sorted(sentences.items()):
        if article in articles:
            pieces = [" ".join(own[i : i + PIECE]) for i in range(0, len(own), PIECE)]
            texts += pieces
            levels += [level] * len(pieces)
    measured = make_pipeline(FunctionTransformer(measures), StandardScaler())
    features = FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)),
            ("letters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=3)),
            ("measures", measured),
        ]
    )
    return make_pipeline(features, LogisticRegression(max_iter=3000, C=10.0)).fit(texts, levels)


def measures(texts: Sequence[str]) -> Any:
    """Grade, words per sentence and letters per word."""
    rows = []
    for text in texts:
        said = tokens(text)
        ends = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
        rows.append([grade(text), len(said) / ends, sum(map(len, said)) / max(1, len(said))])
    return np.array(rows)


def pooled(some: Asked, who: str) -> dict[str, str]:
    """What one has written for each article, as one text: single sentences say too little of a level."""
    of: dict[str, list[str]] = defaultdict(list)
    for one in some:
        of[one["article"]].append(one[who])
    return {article: " ".join(own) for article, own in of.items()}


def grades(some: Asked, who: str) -> list[float]:
    """Of each article's text."""
    return [grade(text) for text in pooled(some, who).values()]


def main(at: Story) -> None:
    pairs, sentences = read(at.data)
    articles = sorted({article for article, _ in sentences})
    random.Random(0).shuffle(articles)
    test, valid, train = set(articles[:30]), set(articles[30:45]), set(articles[45:])
    for level in LEVELS:
        for split, source, each, few in (("train", train, 4, 12), ("valid", valid, 2, 6), ("test", test, 4, 12)):
            chosen, n = (set(sorted(source)[:few]), 1) if at.tiny else (source, each)
            at.rows(f"{level}/{split}.jsonl", pick(pairs[level], chosen, n))

    trained = [at.train(level, f"to-{level}", "--system", SYSTEM, epochs="1") for level in LEVELS]
    stages, asked = list(trained), list[dict[str, Any]]()
    for level in LEVELS:  # its held-out pairs are answered, and their references scored, by all three and by the base
        other, third = (f"to-{name}" for name in LEVELS if name != level)
        own, by_own = at.answers(f"to-{level}", level, f"{level}-own", "--few-shot", "3")
        against = ("--against", third, "--few-shot", "0")
        others, by_others = at.answers(other, level, f"{level}-others", *against)
        stages += [own, others]
        for one, two in zip(by_own, by_others, strict=True):
            who = {
                "base": (one, "base"),
                level: (one, "adapter"),
                other[3:]: (two, "adapter"),
                third[3:]: (two, "base"),
            }
            asked.append(
                {
                    "level": level,
                    "article": one["group"],
                    "source": one["question"],
                    "reference": one["reference"],
                    "examples": one["base_few_shot"],
                    "nll": {name: line["nll"][key] for name, (line, key) in who.items()},
                    **{name: line[key] for name, (line, key) in who.items()},
                }
            )
    stages.append(at.report(*(f"to-{level}" for level in LEVELS)))
    at.tell(stages, told(asked, recogniser(sentences, train), trained))


def told(asked: Asked, model: Any, trained: Sequence[Stage]) -> str:
    """The results in tables."""
    of = {level: [one for one in asked if one["level"] == level] for level in LEVELS}
    true = [(text, level) for level in LEVELS for text in pooled(of[level], "reference").values()]
    right = 100 * model.score(*map(list, zip(*true, strict=True)))
    apart = gain(grades(asked, "advanced"), grades(asked, "elementary"), None)
    differ = [one for one in asked if len({one[who] for who in ("base", *LEVELS)}) == 1 + len(LEVELS)]
    shown = (differ or asked)[len(differ) // 2]
    same = {stage.summary["base_identity"] for stage in trained}
    unchanged = all(stage.summary["base_unchanged"] for stage in trained)

    def each(what: str) -> str:
        return ", ".join(f"{stage.summary[what]:,}" for stage in trained)

    seconds = " + ".join(f"{stage.summary['seconds']['train']:.0f}" for stage in trained)
    articles = {one["article"] for one in asked}
    return "\n\n".join(
        [
            f"{len(asked)} pairs of {len(articles)} articles that training has not seen; intervals over articles. "
            "NLL of what people wrote at a level, nats per token, and how much worse than "
            "the level's own adapter (bold), "
            "paired:",
            nll_matrix(of),
            "The level of the texts, those of one article taken together. The recogniser is "
            f"right for {right:.0f} % of "
            f"the {len(true)} texts people wrote for articles it has not seen (by chance 33 %):",
            recognised(asked, of, model),
            "Grade over that of the sentences given, on the pairs that end in a level, paired:",
            steps(of),
            "To the same sentences, the grade of the advanced adapter's answers over the elementary one's is "
            f"{apart.signed(1)}.",
            "How near the answers are to what people wrote:",
            nearness(of),
            f"Training: {each('n_train')} pairs, {each('steps')} steps, "
            f"{trained[0].summary['trainable_parameters']:,} parameters each, {seconds} s. "
            f"One base, {'the same' if len(same) == 1 else 'NOT the same'} in all three runs (SHA-256 "
            f"{sorted(same)[0][:16]}…); unchanged after each: {'yes' if unchanged else 'NO'}.",
            f"To {100 * len(differ) / len(asked):.0f} % of the sentences base and adapters "
            "give four different answers; "
            "one of them:",
            f"```text\ngiven:         {shown['source']}\n"
            + "\n".join(f"{level + ':':<14} {shown[level]}" for level in LEVELS)
            + "\n```",
        ]
    )


def nll_matrix(of: Mapping[str, Asked]) -> str:
    """Base and every adapter on what people wrote at every level."""

    def cell(who: str, level: str) -> str:
        own, found = ([one["nll"][name] for one in of[level]] for name in (level, who))
        if who == level:
            return f"**{np.mean(own):.3f}**"
        return f"{np.mean(found):.3f}: " + gain(found, own, [one["article"] for one in of[level]]).signed(3)

    rows = [
        [f"adapter, {who}" if who in LEVELS else who, *(cell(who, level) for level in LEVELS)]
        for who in ("base", *LEVELS)
    ]
    return table(["", *(f"{level} texts" for level in LEVELS)], rows)


def recognised(asked: Asked, of: Mapping[str, Asked], model: Any) -> str:
    """Grade, and what the recogniser takes the texts for."""
    lines = [("the sentences given", asked, "source")]
    lines += [(f"what people wrote, {level}", of[level], "reference") for level in LEVELS]
    lines += [(f"base, 3 {level} examples in its prompt", of[level], "examples") for level in LEVELS]
    lines += [(f"adapter, {level}", asked, level) for level in LEVELS]
    rows: list[list[object]] = []
    for label, some, who in lines:
        seen = model.predict(list(pooled(some, who).values())).tolist()
        shares = [f"{100 * seen.count(level) / len(seen):.0f}" for level in LEVELS]
        rows.append([label, mean(grades(some, who), None), *shares])
    return table(["", "grade", *(f"taken for {level}, %" for level in LEVELS)], rows)


def steps(of: Mapping[str, Asked]) -> str:
    """How far everyone moves the grade of the sentences given."""

    def moved(who: str, level: str) -> str:
        return gain(grades(of[level], who), grades(of[level], "source"), None).signed(1)

    return table(
        ["", *LEVELS],
        [
            [label, *(moved(who or level, level) for level in LEVELS)]
            for label, who in WRITERS.items()
            if who != "source"
        ],
    )


def nearness(of: Mapping[str, Asked]) -> str:
    """ROUGE-L against what people wrote, and how many answers are the sentence given."""
    rows = []
    for level, some in of.items():
        for label, who in WRITERS.items():
            if who == "reference":
                continue
            texts = [one[who or level] for one in some]
            copied = [tokens(text) == tokens(one["source"]) for text, one in zip(texts, some, strict=True)]
            like = [rouge_l(text, one["reference"]) for text, one in zip(texts, some, strict=True)]
            rows.append(
                [
                    f"{level}: {label}",
                    mean(like, [one["article"] for one in some]),
                    f"{100 * np.mean(copied):.0f}",
                    f"{np.mean([*map(words, texts)]):.0f}",
                ]
            )
    return table(["", "ROUGE-L", "copied, %", "words"], rows)


if __name__ == "__main__":
    main(story("reading_levels", __doc__.splitlines()[0], "onestop"))
