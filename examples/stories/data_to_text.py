"""From a list of facts to a sentence: restaurants of the E2E challenge, learnt from 300 lists.

    pip install 'lorafit[stories]'
    LORAFIT_DATA=... python examples/stories/data_to_text.py

docs/stories/data_to_text.md tells what comes out.
"""

from __future__ import annotations

import csv
import gzip
import random
import re
from collections import defaultdict
from pathlib import Path

from scores import Scored, bleu, gain, mean, rouge_l, words
from verbs import Story, story, table

SYSTEM = "Write one or two sentences that say everything in this list about the place, and nothing else."
ARMS = {
    "values": "the values, joined",
    "base": "base",
    "base_few_shot": "base, 3 examples in its prompt",
    "adapter": "adapter",
}
FIELDS = ("name", "eatType", "food", "area", "near")  # that people say as they stand there


def read(path: Path) -> dict[str, list[str]]:
    """Each list of facts (meaning representation) with the sentences people wrote for it."""
    texts: dict[str, list[str]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            texts[row["mr"]].append(row["ref"])
    return texts


def pick(texts: dict[str, list[str]], n: int, each: int) -> list[dict[str, str]]:
    """n lists drawn with a seed, with up to so many sentences each; those of one list belong together."""
    chosen = random.Random(0).sample(sorted(texts), min(n, len(texts)))
    return [{"prompt": mr, "completion": text, "group": mr} for mr in chosen for text in texts[mr][:each]]


def values(mr: str) -> dict[str, str]:
    """name[Blue Spice], area[riverside] → its fields."""
    return dict(re.findall(r"(\w[\w ]*)\[([^\]]*)\]", mr))


def names_said(mr: str, answer: str) -> float:
    """Per cent of the names in a list (the place's own, and that of the place near it) that an answer says."""
    names = [value for field, value in values(mr).items() if field in {"name", "near"}]
    return 100 * sum(name.lower() in answer.lower() for name in names) / len(names)


def said_of(field: str, mrs: list[str], texts: list[str]) -> str:
    """How many of the lists that have a field see its value said word for word."""
    hits = [
        found.lower() in text.lower() for mr, text in zip(mrs, texts, strict=True) if (found := values(mr).get(field))
    ]
    return f"{100 * sum(hits) / len(hits):.0f}" if hits else "-"


def main(at: Story) -> None:
    known = read(at.data / "testset_w_refs.csv")
    at.rows("restaurants/train.jsonl", pick(read(at.data / "trainset_rebuilt.csv.gz"), 24 if at.tiny else 300, 2))
    at.rows("restaurants/valid.jsonl", pick(read(at.data / "devset.csv"), 12 if at.tiny else 60, 1))
    at.rows("restaurants/test.jsonl", pick(known, 12 if at.tiny else len(known), 1))
    # --skip-bad: should a list of dev or test be near-identical to one of training, with a like sentence, the training
    # run leaves it out and says so; the evaluation below answers the whole official test.
    trained = at.train("restaurants", "run", "--system", SYSTEM, "--skip-bad")
    evaluated, answers = at.answers("run", "restaurants", "run-answers", "--few-shot", "3")

    mrs = [one["question"] for one in answers]
    said = {arm: [one[arm] for one in answers] for arm in ARMS if arm != "values"}
    said["values"] = [", ".join(values(mr).values()) for mr in mrs]
    rouge = {arm: [rouge_l(a, *known[mr]) for a, mr in zip(said[arm], mrs, strict=True)] for arm in ARMS}
    rows: list[list[object]] = [
        [
            label,
            bleu(said[arm], [known[mr] for mr in mrs]),
            mean(rouge[arm], mrs),
            mean([names_said(mr, a) for mr, a in zip(mrs, said[arm], strict=True)], mrs),
            f"{sum(map(words, said[arm])) / len(mrs):.0f}",
        ]
        for arm, label in ARMS.items()
    ]
    ahead = gain(rouge["adapter"], rouge["base_few_shot"], mrs)
    nll = evaluated.summary["nll"]
    change = Scored(nll["difference"], tuple(nll["ci95"]) if nll["ci95"] else None)
    train, took = trained.summary, trained.summary["seconds"]
    sample = answers[len(answers) // 2]
    at.tell(
        [trained, evaluated],
        "\n\n".join(
            [
                f"{len(mrs)} lists of the official test, none of which training has seen; intervals over lists:",
                table(["", "BLEU", "ROUGE-L", "names said, %", "words"], rows),
                f"Adapter over the base with examples: {ahead.signed(1)} ROUGE-L, paired. NLL of "
                "a reference, nats per token: "
                f"{nll['base']:.3f} → {nll['adapter']:.3f}, paired difference {change.signed(3)}.",
                "Said word for word, per cent of the lists that have the field:",
                table(
                    ["", *FIELDS],
                    [
                        [label, *(said_of(field, mrs, texts) for field in FIELDS)]
                        for label, texts in (
                            ("adapter", said["adapter"]),
                            ("people, one sentence each", [one["reference"] for one in answers]),
                        )
                    ],
                ),
                f"Training: {train['n_train']} sentences, {train['steps']} steps, "
                f"{train['trainable_parameters']:,} parameters"
                f", {took['train']:.0f} s. Base unchanged: {'yes' if evaluated.summary['base_unchanged'] else 'NO'}.",
                f"```text\n{sample['question']}\nbase:     {sample['base']}\nexamples: {sample['base_few_shot']}\n"
                f"adapter:  {sample['adapter']}\n```",
            ]
        ),
    )


if __name__ == "__main__":
    main(story("data_to_text", __doc__.splitlines()[0], "e2e_nlg"))
