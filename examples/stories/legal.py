"""From a clause of a contract to plain English, by adapters that have not seen the document it stands in.

    pip install 'lorafit[stories]'
    LORAFIT_DATA=... python examples/stories/legal.py

docs/stories/legal.md tells what comes out.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scores import Scored, gain, grade, mean, rouge_1, rouge_l, share_from, words
from sklearn.feature_extraction.text import TfidfVectorizer
from verbs import Stage, Story, story, table

from lorafit.files import read_json

SYSTEM = "Say in one short plain sentence what this clause of a contract means for the user."
LONGEST = 100  # words of a clause
FOLDS = 3
MODELLESS = {"first": "first sentence of the clause", "nearest": "summary of the most similar training clause"}
BASES = {"base": "base", "base_few_shot": "base, 3 examples in its prompt"}
ARMS = {**MODELLESS, **BASES, "adapter": "adapter", "reference": "what people wrote"}


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The clauses of each document with their summaries, as examples whose group is the document."""
    documents: dict[str, list[dict[str, str]]] = defaultdict(list)
    for one in read_json(folder / "all_v1.json").values():
        clause, summary = one["original_text"].strip(), one["reference_summary"].strip()
        if words(clause) <= LONGEST:
            documents[one["doc"]].append({"prompt": clause, "completion": summary, "group": one["doc"]})
    return documents


def fold_of(documents: dict[str, list[dict[str, str]]]) -> dict[str, int]:
    """A fold for each document: the largest first, each where there are fewest clauses so far; ties drawn."""
    names = sorted(documents)
    random.Random(0).shuffle(names)
    sizes = [0] * FOLDS
    folds = {}
    for name in sorted(names, key=lambda name: -len(documents[name])):
        folds[name] = sizes.index(min(sizes))
        sizes[folds[name]] += len(documents[name])
    return folds


def first_sentence(clause: str) -> str:
    return re.split(r"(?<=[.!?])\s", clause, maxsplit=1)[0]


def nearest(known: Sequence[dict[str, str]], clauses: Sequence[str]) -> list[dict[str, str]]:
    """For each clause the one of training that shares most of its rare words (cosine of TF-IDF)."""
    words_of = TfidfVectorizer(sublinear_tf=True)
    table_of = words_of.fit_transform([one["prompt"] for one in known])
    return [known[int(i)] for i in (words_of.transform(clauses) @ table_of.T).toarray().argmax(axis=1)]


def main(at: Story) -> None:
    documents = read(at.data)
    folds = fold_of(documents)
    if at.tiny:  # one clause of every document: each fold keeps documents of its own
        documents = {name: own[:1] for name, own in documents.items()}
    stages: list[Stage] = []
    asked: list[dict[str, Any]] = []
    for k in range(FOLDS):
        sides: dict[bool, list[dict[str, str]]] = {True: [], False: []}
        for name, own in documents.items():
            sides[folds[name] == k] += own
        at.rows(f"fold{k}/train.jsonl", sides[False])
        at.rows(f"fold{k}/test.jsonl", sides[True])
        stages.append(at.train(f"fold{k}", f"run{k}", "--system", SYSTEM, epochs="2"))
        stage, lines = at.answers(f"run{k}", f"fold{k}", f"answers{k}", "--few-shot", "3")
        stages.append(stage)
        seen = {one["completion"] for one in sides[False]}
        near = nearest(sides[False], [one["question"] for one in lines])
        for one, known in zip(lines, near, strict=True):
            asked.append(
                {
                    **one,
                    "first": first_sentence(one["question"]),
                    "nearest": known["completion"],
                    "seen": one["reference"] in seen,
                }
            )
    stages.append(at.report(*(f"run{k}" for k in range(FOLDS))))
    at.tell(stages, told(asked, stages))


def told(asked: Sequence[dict[str, Any]], stages: Sequence[Stage]) -> str:
    """The results in tables: every arm on all clauses, then on those whose summary occurs nowhere in training."""
    trained, evaluated = stages[0:-1:2], stages[1::2]
    unseen = [one for one in asked if not one["seen"]]

    def scores(lines: Sequence[dict[str, Any]], arm: str, score: Any) -> list[float]:
        return [score(one[arm], one["reference"]) for one in lines]

    def row(arm: str) -> list[object]:
        documents = [one["group"] for one in asked]
        near = [
            mean(scores(asked, arm, rouge_l), documents),
            mean(scores(asked, arm, rouge_1), documents),
            mean(scores(unseen, arm, rouge_l), [one["group"] for one in unseen]),
        ]
        form = (
            fmean(words(one[arm]) for one in asked),
            fmean(grade(one[arm]) for one in asked),
            fmean(share_from(one[arm], one["question"]) for one in asked),
        )
        return [
            ARMS[arm],
            *(["", "", ""] if arm == "reference" else near),
            f"{form[0]:.0f}",
            f"{form[1]:.1f}",
            f"{form[2]:.0f}",
        ]

    def ahead(lines: Sequence[dict[str, Any]], arm: str) -> str:
        groups = [one["group"] for one in lines]
        return gain(scores(lines, "adapter", rouge_l), scores(lines, arm, rouge_l), groups).signed(1)

    nlls = []
    for stage in evaluated:
        nll = stage.summary["nll"]
        paired = Scored(nll["difference"], tuple(nll["ci95"]) if nll["ci95"] else None)
        nlls.append(f"{nll['base']:.2f} → {nll['adapter']:.2f}, {paired.signed(2)}")
    one = unseen[len(unseen) // 2]
    unchanged = all(stage.summary["base_unchanged"] for stage in (*trained, *evaluated))
    seconds = sum(stage.summary["seconds"]["train"] for stage in trained)
    return "\n\n".join(
        [
            f"{len(asked)} clauses of {len({one['group'] for one in asked})} documents, each "
            "answered by an adapter that "
            f"has not seen its document; {len(unseen)} of their summaries occur nowhere in that adapter's training. "
            "Intervals over documents.",
            table(
                ["", "ROUGE-L", "ROUGE-1", "ROUGE-L, unseen summaries", "words", "grade", "words from the clause, %"],
                [row(arm) for arm in ARMS],
            ),
            "The adapter's gain in ROUGE-L, paired:",
            table(
                ["over", "all", "unseen summaries"],
                [[ARMS[arm], ahead(asked, arm), ahead(unseen, arm)] for arm in (*MODELLESS, *BASES)],
            ),
            "NLL of the summaries in each fold, base → adapter, paired difference: " + "; ".join(nlls) + ".",
            f"Training: {trained[0].summary['steps']} steps a fold, {seconds:.0f} s in all. Base unchanged: "
            f"{'yes' if unchanged else 'NO'}.",
            f"```text\nclause:   {one['question']}\nwanted:   {one['reference']}\n"
            f"examples: {one['base_few_shot']}\nadapter:  {one['adapter']}\n```",
        ]
    )


if __name__ == "__main__":
    main(story("legal", __doc__.splitlines()[0], "legal_summarization"))
