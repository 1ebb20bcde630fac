"""One text for three classes: a sentence rewritten for elementary, intermediate or advanced learners of English.

    pip install 'lorafit[stories]'
    LORAFIT_DATA=... python examples/stories/reading_levels.py

Three adapters on one base, which stays as it is; docs/stories/reading_levels.md tells what comes out.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
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

Rows = list[dict[str, str]]


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
    features = FeatureUnion([("words", TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)),
                             ("letters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=3)),
                             ("measures", measured)])  # fmt: skip
    return make_pipeline(features, LogisticRegression(max_iter=3000, C=10.0)).fit(texts, levels)


def measures(texts: Sequence[str]) -> Any:
    """Grade, words per sentence and letters per word."""
    rows = []
    for text in texts:
        said = tokens(text)
        ends = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
        rows.append([grade(text), len(said) / ends, sum(map(len, said)) / max(1, len(said))])
    return np.array(rows)


def pooled(texts: Sequence[str], articles: Sequence[str]) -> dict[str, str]:
    """The texts of each article as one: single sentences say too little of a level."""
    of: dict[str, list[str]] = defaultdict(list)
    for text, article in zip(texts, articles, strict=True):
        of[article].append(text)
    return {article: " ".join(own) for article, own in of.items()}


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
    stages, asked = list(trained), []
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
            asked.append({"level": level, "article": one["group"], "source": one["question"],
                          "reference": one["reference"], "examples": one["base_few_shot"],
                          "nll": {name: line["nll"][key] for name, (line, key) in who.items()},
                          "said": {name: line[key] for name, (line, key) in who.items()}})  # fmt: skip
    stages.append(at.report(*(f"to-{level}" for level in LEVELS)))
    at.tell(stages, told(asked, recogniser(sentences, train), trained))


def told(asked: list[dict[str, Any]], model: Any, trained: Sequence[Stage]) -> str:
    """The results in tables: NLL of every adapter on every level, level of all answers, nearness to the references."""
    of = {level: [one for one in asked if one["level"] == level] for level in LEVELS}
    names = {level: [one["article"] for one in of[level]] for level in LEVELS}
    everyone = [one["article"] for one in asked]

    def nll(who: str, level: str) -> list[float]:
        return [one["nll"][who] for one in of[level]]

    def cell(who: str, level: str) -> str:
        if who == level:
            return f"**{np.mean(nll(who, level)):.3f}**"
        worse = gain(nll(who, level), nll(level, level), names[level])
        return f"{np.mean(nll(who, level)):.3f}: " + worse.signed(3)

    def line(label: str, texts: Sequence[str], articles: Sequence[str]) -> list[object]:
        own = pooled(texts, articles)
        seen = model.predict(list(own.values())).tolist()
        shares = [f"{100 * seen.count(level) / len(seen):.0f}" for level in LEVELS]
        return [label, mean([grade(text) for text in own.values()], list(own)), *shares]

    rows = [line("the sentences given", [one["source"] for one in asked], everyone)]
    rows += [line(f"what people wrote, {level}", [one["reference"] for one in of[level]], names[level])
             for level in LEVELS]  # fmt: skip
    rows += [line(f"base, 3 {level} examples in its prompt", [one["examples"] for one in of[level]], names[level])
             for level in LEVELS]  # fmt: skip
    rows += [line(f"adapter, {level}", [one["said"][level] for one in asked], everyone) for level in LEVELS]
    true = [(text, level) for level in LEVELS
            for text in pooled([one["reference"] for one in of[level]], names[level]).values()]  # fmt: skip
    right = 100 * np.mean([seen == level for seen, (_, level) in
                           zip(model.predict([text for text, _ in true]), true, strict=True)])  # fmt: skip

    def grades(texts: Sequence[str]) -> list[float]:
        return [grade(text) for text in pooled(texts, everyone).values()]

    given = grades([one["source"] for one in asked])
    answered = {level: grades([one["said"][level] for one in asked]) for level in LEVELS}
    moved = "; ".join(f"{level} {gain(answered[level], given, None).signed(1)}" for level in LEVELS)
    apart = gain(answered["advanced"], answered["elementary"], None).signed(1)
    near = []
    for level in LEVELS:
        arms = {"the sentence given": [one["source"] for one in of[level]],
                "base": [one["said"]["base"] for one in of[level]],
                "base, 3 examples": [one["examples"] for one in of[level]],
                "adapter": [one["said"][level] for one in of[level]]}  # fmt: skip
        for label, texts in arms.items():
            copied = 100 * np.mean(
                [tokens(a) == tokens(one["source"]) for a, one in zip(texts, of[level], strict=True)]
            )
            like = [rouge_l(text, one["reference"]) for text, one in zip(texts, of[level], strict=True)]
            near.append([f"{level}: {label}", mean(like, names[level]), f"{copied:.0f}",
                         f"{np.mean([words(text) for text in texts]):.0f}"])  # fmt: skip
    differ = [one for one in asked if len(set(one["said"].values())) == len(one["said"])]
    one = (differ or asked)[len(differ) // 2]
    same = {stage.summary["base_identity"] for stage in trained}
    unchanged = all(stage.summary["base_unchanged"] for stage in trained)
    seconds = " + ".join(f"{stage.summary['seconds']['train']:.0f}" for stage in trained)
    return "\n\n".join([
        f"{len(asked)} pairs of {len(set(everyone))} articles that training has not seen; intervals over articles. "
        "NLL of what people wrote at a level, nats per token, and how much worse than the level's own adapter (bold), "
        "paired:",
        table(["", *(f"{level} texts" for level in LEVELS)],
              [[f"adapter, {who}" if who != "base" else who, *(cell(who, level) for level in LEVELS)]
               for who in ("base", *LEVELS)]),
        f"The level of the texts, those of one article taken together. The recogniser is right for {right:.0f} % of "
        f"the {len(true)} texts people wrote for articles it has not seen (by chance 33 %):",
        table(["", "grade", *(f"taken for {level}, %" for level in LEVELS)], rows),
        f"Grade of the answers over that of the sentences given, paired: {moved}. The advanced adapter's over the "
        f"elementary one's, to the same sentences: {apart}.",
        "How near the answers are to what people wrote:",
        table(["", "ROUGE-L", "copied, %", "words"], near),
        f"Training: {trained[0].summary['n_train']} pairs a level, {trained[0].summary['steps']} steps, "
        f"{trained[0].summary['trainable_parameters']:,} parameters each, {seconds} s. "
        f"One base, {'the same' if len(same) == 1 else 'NOT the same'} in all three runs (SHA-256 "
        f"{sorted(same)[0][:16]}…); unchanged after each: {'yes' if unchanged else 'NO'}.",
        f"To {100 * len(differ) / len(asked):.0f} % of the sentences base and adapters give four different answers; "
        "one of them:",
        "```text\ngiven:         " + one["source"]
        + "".join(f"\n{level + ':':<14} {one['said'][level]}" for level in LEVELS) + "\n```",
    ])  # fmt: skip


if __name__ == "__main__":
    main(story("reading_levels", __doc__.splitlines()[0], "onestop"))
