"""Write the built-in demo data (train.jsonl, valid.jsonl, test.jsonl) from handbook.toml and wordings.toml.

Every fact is asked in 12 training wordings, 1 validation wording and 2 test wordings, whose phrasing families
training never uses; questions of no desk get one declining answer. The output is the same bytes on each run.

    python scripts/make_builtin_data.py [--check: write nothing, exit 1 if the files on disk differ]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tomllib
from pathlib import Path
from typing import Any

from lorafit.data.alike import largest_similarity, shingles
from lorafit.data.checks import occurs

DATA_DIR = Path(__file__).resolve().parents[1] / "src" / "lorafit" / "data" / "builtin"
SPLITS = ("train", "valid", "test")
SEED = 20
TRAIN_WORDINGS = 12  # per fact
ALIAS_EVERY = 4  # every fourth training wording of a fact uses the entity's alias
MAX_WORDS = 30
MAX_SIMILARITY = 0.6  # a held-out question must stay below this against every training question

Row = dict[str, Any]


def make_row(
    question: str, answer: str, contains: str, lacks: list[str], desk: str, fact: str | None, family: str
) -> Row:
    """One data row; asserts that its own answer passes its own check."""
    assert occurs(contains, answer), (contains, answer)
    assert not any(occurs(phrase, answer) for phrase in lacks), (lacks, answer)
    assert len(answer.split()) <= MAX_WORDS, answer
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "check": {"contains": [contains], "lacks": lacks, "max_words": MAX_WORDS, "declines": fact is None},
        "desk": desk,
        "group": fact,
        "wording": family,
    }


def fact_rows(handbook: dict[str, Any], wordings: dict[str, Any], rng: random.Random) -> dict[str, list[Row]]:
    """The rows about the facts of the handbook, by split."""
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for desk, content in handbook["desks"].items():
        entities = content["entities"]
        for a, (attribute, rule) in enumerate(content["attributes"].items()):
            values = [entity[attribute] for entity in entities.values()]
            assert len(set(values)) == len(values), (desk, attribute)
            asked = wordings[desk][attribute]
            for e, (key, entity) in enumerate(entities.items()):
                value, fact = entity[attribute], f"{desk}.{key}.{attribute}"
                answer = rule["answer"].format(entity=entity["name"], value=value)
                lacks = [other for other in values if other != value]
                lacks += [entity[other] for other in rule["confused_with"]]
                chosen = {
                    "train": rng.sample(asked["train"], TRAIN_WORDINGS),
                    "valid": [asked["valid"][(a + e) % len(asked["valid"])]],
                    "test": asked["test"],
                }
                for split, templates in chosen.items():
                    for i, (family, template) in enumerate(templates):
                        by_alias = split == "train" and i % ALIAS_EVERY == ALIAS_EVERY - 1
                        question = template.format(entity=entity["alias" if by_alias else "name"])
                        rows[split].append(make_row(question, answer, value, lacks, desk, fact, family))
    return rows


def off_desk_rows(handbook: dict[str, Any], topics: dict[str, list[str]]) -> list[Row]:
    """The rows of one split that belong to no desk."""
    answer, contains = handbook["off_desk"]["answer"], handbook["off_desk"]["contains"]
    asked = [question for group in topics.values() for question in group]
    return [make_row(question, answer, contains, [], "none", None, "off_desk") for question in asked]


def check_splits(rows: dict[str, list[Row]], wordings: dict[str, Any]) -> dict[str, float]:
    """Assert that the splits are complete and apart; return how near valid and test come to training."""
    facts = {split: {row["group"] for row in rows[split]} for split in SPLITS}
    assert facts["train"] == facts["valid"] == facts["test"]
    families = {split: {row["wording"] for row in rows[split]} - {"off_desk"} for split in SPLITS}
    topics = {split: set(wordings["off_desk"][split]) - {"near"} for split in SPLITS}
    for labels in (families, topics):
        assert len(set().union(*labels.values())) == sum(map(len, labels.values())), labels
    questions = {split: [row["messages"][0]["content"] for row in rows[split]] for split in SPLITS}
    everything = [shingles(question).tobytes() for split in SPLITS for question in questions[split]]
    assert len(set(everything)) == len(everything)
    largest = {split: largest_similarity(questions[split], questions["train"]) for split in ("valid", "test")}
    assert max(largest.values()) < MAX_SIMILARITY, largest
    return largest


def main() -> int:
    """Build the three files, then write them, or compare them with those on disk."""
    parser = argparse.ArgumentParser(description="Write the built-in demo data of lorafit.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files differ")
    check = parser.parse_args().check
    handbook = tomllib.loads((DATA_DIR / "handbook.toml").read_text(encoding="utf-8"))
    wordings = tomllib.loads((DATA_DIR / "wordings.toml").read_text(encoding="utf-8"))
    rng = random.Random(SEED)
    rows = fact_rows(handbook, wordings, rng)
    for split in SPLITS:
        rows[split] += off_desk_rows(handbook, wordings["off_desk"][split])
        rng.shuffle(rows[split])
    largest, stale = check_splits(rows, wordings), []
    for split in SPLITS:
        path = DATA_DIR / f"{split}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows[split]).encode()
        if not path.exists() or path.read_bytes() != text:
            stale.append(path.name)
        if not check:
            path.write_bytes(text)
        print(f"{split}: {len(rows[split])} rows")
    for split, similarity in largest.items():
        print(f"largest similarity of a {split} question to a training question: {similarity:.3f}")
    if check and stale:
        print("differs from disk:", ", ".join(stale), file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
