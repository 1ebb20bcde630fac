"""What is held out is held out: near-identical prompts and groups stay on one side."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafit.data.alike import SIMILAR, TextIndex, largest_similarity, shingles, similarity
from lorafit.data.checks import is_right
from lorafit.data.examples import SPLITS, Example, Examples, Message
from lorafit.data.prepared import prepare
from lorafit.data.reading import BUILTIN_FOLDER, read_examples
from lorafit.data.report import DataReport
from lorafit.data.split import complete, require_apart
from lorafit.errors import DataError
from lorafit.settings import settings_from

LONG = "When does the night train from the coast to the capital leave on working days in winter"
ROOT = Path(__file__).parents[1]


def pairs_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """The first of every distinct text with those near-identical to it."""
    index = TextIndex(texts)
    rows = [index.row(text) for text in texts]
    near = index.pairs(rows, lambda i, j: np.ones(len(i), np.bool_))
    same = [(rows.index(row), k) for k, row in enumerate(rows) if row in rows[:k]]
    return sorted([*((rows.index(i), rows.index(j)) for i, j in near), *same])


class Deaf:
    def say(self, text: str) -> None: ...
    def data(self, report: DataReport) -> None: ...


def example(prompt: str, where: str = "x:1", answer: str = "Yes.", group: str | None = None) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)), where, group=group)


def asked(examples: Sequence[Example]) -> list[str]:
    return [one.question for one in examples]


def words(rng: random.Random, n: int = 8) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(n))


def family(seed: int) -> list[Example]:
    """Prompts of which many are near-identical and others share a group, in mixed order."""
    rng = random.Random(seed)
    found = []
    for k in range(30):
        text = words(rng)
        found += [example(text + " please" * i, group=f"g{k % 5}" if k < 10 else None) for i in range(k % 3 + 1)]
    rng.shuffle(found)
    return [Example(e.messages, f"x:{i}", group=e.group) for i, e in enumerate(found, 1)]


@pytest.mark.parametrize(
    "other", [LONG + "?", LONG.upper() + "!!", LONG.replace(" ", "  "), LONG.replace("the", "a", 1)]
)
def test_a_prompt_that_differs_in_form_alone_or_in_one_word_is_near_identical(other: str) -> None:
    assert pairs_of([LONG, other]) == [(0, 1)]


def test_an_unrelated_prompt_is_not_near_identical() -> None:
    assert pairs_of([LONG, "How many eggs go into a sponge cake for twelve guests at a birthday party"]) == []


@pytest.mark.parametrize(("one", "other"), [("2+2?", "2-2?"), ("What is 12 + 5?", "What is 12 - 5?"), ("?", "!")])
def test_signs_that_carry_the_meaning_keep_prompts_apart(one: str, other: str) -> None:
    assert pairs_of([one, other]) == []


def test_a_pair_just_below_the_bound_is_not_reported() -> None:
    rng = random.Random(0)
    shared, ends = words(rng, 20), [words(rng, 2), words(rng, 2)]
    pair = [f"{shared} {end}" for end in ends]
    assert SIMILAR - 0.05 < similarity(*map(shingles, pair)) < SIMILAR
    assert pairs_of(pair) == []


def test_the_pairs_found_are_those_of_comparing_each_with_each() -> None:
    rng = random.Random(1)
    texts = []
    for _ in range(60):
        whole = words(rng, 12).split()
        texts += [" ".join(whole), " ".join(whole[: rng.randint(7, 12)])]
    sets = [shingles(text) for text in texts]
    exact = [(i, j) for i, j in combinations(range(len(texts)), 2) if similarity(sets[i], sets[j]) >= SIMILAR]
    assert len(exact) > 20
    assert pairs_of(texts) == exact


def test_what_a_caller_knows_already_is_not_verified_again() -> None:
    texts = [f"{LONG} {n}" for n in range(15)]
    index = TextIndex(texts)
    joined = np.arange(len(index))
    found = 0
    for i, j in index.pairs(range(len(index)), lambda i, j: joined[i] != joined[j]):
        joined[joined == joined[j]] = joined[i]
        found += 1
    assert (found, len(set(joined.tolist()))) == (14, 1)


def test_equal_minima_estimate_the_similarity() -> None:
    rng = random.Random(5)
    whole = words(rng, 150).split()
    texts = [" ".join([*whole[:n], *words(rng, 150 - n).split()]) for n in (150, 140, 120, 90)]
    index = TextIndex(texts)
    for i, j in combinations(range(4), 2):
        share = float((index._lowest[i] == index._lowest[j]).mean())
        assert share == pytest.approx(similarity(shingles(texts[i]), shingles(texts[j])), abs=0.13)


def test_near_identical_texts_are_found_in_memory_that_does_not_grow_with_their_length() -> None:
    """Sets of hashes took 59 KB for a prompt of 570 characters."""
    rng = random.Random(6)
    texts = [words(rng, 1500) for _ in range(60)]
    tracemalloc.start()
    index = TextIndex(texts)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 60 * 2_000 + 50_000
    assert peak < 45e6  # of which 42 MB count what texts share
    assert len(index) == 60


def test_identical_prompts_are_all_tied_to_the_first() -> None:
    assert pairs_of(["alpha beta", "gamma delta", "Alpha  beta", "alpha beta"]) == [(0, 2), (0, 3)]


@pytest.mark.parametrize(
    ("one", "other"), [("In C, when is a = b taken?", "In C, when is a != b taken?"), ("लड़का कहाँ है?", "लड़की कहाँ है?")]
)
def test_signs_and_vowels_that_tell_prompts_apart_are_letters_of_them(one: str, other: str) -> None:
    assert not np.array_equal(shingles(one), shingles(other))


@pytest.mark.parametrize("answers", ["AB", "BA"])
def test_one_of_several_answers_to_a_prompt_is_a_leak_in_whatever_order_they_stand(answers: str) -> None:
    said = {"A": "The first floor is closed for repairs.", "B": "Turn left behind the fountain."}
    train = tuple(example(LONG + " one", f"train:{i}", said[which]) for i, which in enumerate(answers))
    test = tuple(example(LONG + " two", f"test:{i}", text) for i, text in enumerate(("Nobody knows that.", said["B"])))
    with pytest.raises(DataError) as caught:
        require_apart(Examples(train, (), test))
    assert [problem.where for problem in caught.value.problems] == ["test:1"]


def test_all_of_a_large_family_of_near_identical_prompts_are_named() -> None:
    """None is passed over because its family is large: each is near to one of training."""
    rng = random.Random(2)
    families = [words(rng, 20) for _ in range(30)]
    sides = {
        side: tuple(example(f"{families[i % 30]} {side}{i}", f"{side}:{i}") for i in range(n))
        for side, n in (("train", 600), ("test", 300))
    }
    with pytest.raises(DataError) as caught:
        require_apart(Examples(sides["train"], (), sides["test"]))
    assert len(caught.value.problems) == 300


@pytest.mark.parametrize("role", ["system", "user"])
def test_an_instruction_that_all_prompts_share_does_not_make_them_near_identical(role: str) -> None:
    rng = random.Random(3)
    shared = "You answer for the support desk. " + words(rng, 150)
    examples = []
    for i in range(60):
        asked = words(rng, 6)
        before = [Message("system", shared)] if role == "system" else []
        question = asked if role == "system" else f"{shared}\n\n{asked}"
        examples.append(Example((*before, Message("user", question), Message("assistant", "Yes.")), f"x:{i}"))
    whole = complete(Examples(tuple(examples)))
    assert (len(whole.train), len(whole.valid), len(whole.test)) == (48, 6, 6)
    require_apart(whole)


def test_prompts_in_other_scripts_are_told_apart() -> None:
    assert pairs_of(["как пройти в библиотеку", "сколько стоит этот билет", "図書館はどこですか"]) == []


def test_what_is_held_out_is_fixed_by_the_data_in_whatever_order_the_rows_stand() -> None:
    rows = family(0)
    one, other = (complete(Examples(tuple(given))) for given in (rows, rows[::-1]))
    assert {e.where for e in one.test} == {e.where for e in other.test}
    assert {e.where for e in one.valid} == {e.where for e in other.valid}


def test_the_seed_of_a_run_leaves_what_is_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": e.question, "completion": e.answer} for e in family(0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = [prepare(str(tmp_path / "a.jsonl"), settings_from({"seed": seed}), Deaf())[0] for seed in (1, 2)]
    assert found[0].digest() == found[1].digest()


def test_other_rows_give_another_split() -> None:
    assert set(asked(complete(Examples(tuple(family(0)))).test)) != set(
        asked(complete(Examples(tuple(family(1)))).test)
    )


def test_a_few_rows_more_leave_most_of_what_is_held_out() -> None:
    rng = random.Random(4)
    rows = [example(words(rng), f"x:{i}") for i in range(200)]
    before, after = (complete(Examples(tuple(given))) for given in (rows, [*rows, *family(9)[:4]]))
    assert len({e.where for e in before.test} & {e.where for e in after.test}) >= 16


@pytest.mark.parametrize("seed", range(6))
def test_near_identical_prompts_are_never_on_two_sides(seed: int) -> None:
    require_apart(complete(Examples(tuple(family(seed)))))


@pytest.mark.parametrize("seed", range(6))
def test_a_group_is_never_on_two_sides(seed: int) -> None:
    split = complete(Examples(tuple(family(seed))), share=0.2).by_name()
    groups = [{e.group for e in examples} - {None} for examples in split.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_split_uses_every_example_once(seed: int) -> None:
    every = family(seed)
    split = complete(Examples(tuple(every)))
    assert sorted(e.where for side in split.by_name().values() for e in side) == sorted(e.where for e in every)


def test_the_share_is_what_is_taken_for_validation_and_for_test() -> None:
    rng = random.Random(0)
    split = complete(Examples(tuple(example(words(rng)) for _ in range(50))), share=0.2)
    assert [len(side) for side in split.by_name().values()] == [30, 10, 10]


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(DataError, match=r"too few to split: 2 examples, 2 of them .* 3 are needed"):
        complete(Examples((example("alpha beta gamma"), example("one two three"))))


def test_examples_that_all_say_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="40 examples, 1 of them independent"):
        complete(Examples(tuple(example(LONG + "?" * i) for i in range(40))))


def test_examples_of_one_group_are_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(DataError, match="30 examples, 1 of them independent"):
        complete(Examples(tuple(example(words(rng), group="one") for _ in range(30))))


def test_three_groups_are_enough_however_large_they_are() -> None:
    rng = random.Random(0)
    split = complete(Examples(tuple(example(words(rng), group="abc"[i % 3]) for i in range(30))))
    groups = [{e.group for e in side} for side in split.by_name().values()]
    assert [len(one) for one in groups] == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_given_splits_stay_as_they_are() -> None:
    rng = random.Random(0)
    given = Examples(*(tuple(example(words(rng)) for _ in range(5)) for _ in SPLITS))
    assert complete(given) is given


@pytest.mark.parametrize("missing", ["valid", "test"])
def test_only_the_missing_split_is_taken_from_training(missing: str) -> None:
    rng = random.Random(0)
    train, held = (tuple(example(words(rng), f"{k}:{i}") for i in range(20)) for k in "ab")
    kept = "test" if missing == "valid" else "valid"
    split = complete(Examples(train, **{kept: held})).by_name()
    assert (split[kept], len(split[missing]), len(split["train"])) == (held, 2, 18)


def refused(examples: Examples) -> list[tuple[str, str]]:
    with pytest.raises(DataError) as caught:
        require_apart(examples)
    return [(problem.where, problem.what) for problem in caught.value.problems]


def test_test_near_training_is_named_with_both_places() -> None:
    given = Examples((example(LONG, "train:7"),), test=(example(LONG + "?", "test:3"),))
    assert refused(given) == [("test:3", "near-identical to train:7 in train")]


def test_validation_near_training_is_named_with_both_places() -> None:
    given = Examples((example(LONG, "train:7"),), (example(LONG + "?", "valid:3"),))
    assert refused(given) == [("valid:3", "near-identical to train:7 in train")]


def test_test_near_validation_is_named_with_both_places() -> None:
    given = Examples((example("other"),), (example(LONG, "valid:7"),), (example(LONG + " now", "test:3"),))
    assert refused(given) == [("test:3", "near-identical to valid:7 in valid")]


def test_every_one_of_identical_held_out_prompts_is_named() -> None:
    held = tuple(example(LONG + " now", f"test:{i}") for i in range(3))
    given = Examples((example(LONG, "train:1"),), test=held)
    assert [where for where, _ in refused(given)] == ["test:0", "test:1", "test:2"]


def test_near_identical_prompts_with_answers_of_their_own_are_counted_and_let_pass() -> None:
    """ "open[yes]" and "open[no]" ask for two answers."""
    said = "name[The Vaults], food[Italian], area[riverside], near[The Old Post Office], open[{}]".format
    train = example(
        said("yes"), answer="The Vaults, by the river near the post office, is an Italian place that is open."
    )
    other = example(said("no"), answer="Sadly closed: that riverside pasta house.")
    assert require_apart(Examples((train,), (), (other,))) == 1
    alike = example(
        said("no"), answer="The Vaults, by the river near the post office, is an Italian place that is shut."
    )
    with pytest.raises(DataError, match="near-identical"):
        require_apart(Examples((train,), (), (alike,)))


def test_one_prompt_on_two_sides_is_refused_whatever_its_answers() -> None:
    with pytest.raises(DataError, match="near-identical"):
        require_apart(
            Examples((example(LONG, answer="yes"),), (), (example(LONG + "?", answer="quite another thing"),))
        )


def test_near_identical_prompts_on_one_side_are_no_problem() -> None:
    require_apart(Examples((example(LONG), example(LONG + "?")), (example("a b"),), (example("c d"),)))


@pytest.fixture(scope="module")
def builtin() -> Examples:
    return read_examples("builtin")


@pytest.fixture(scope="module")
def raw() -> dict[str, list[dict[str, Any]]]:
    lines = {name: (BUILTIN_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in SPLITS}
    return {name: [json.loads(line) for line in found] for name, found in lines.items()}


def test_the_builtin_splits_are_apart(builtin: Examples) -> None:
    require_apart(builtin)


@pytest.mark.parametrize("side", ["valid", "test"])
def test_no_builtin_question_is_near_a_training_question(builtin: Examples, side: str) -> None:
    largest = largest_similarity(asked(builtin.by_name()[side]), asked(builtin.train))
    assert largest < SIMILAR, f"the largest similarity of {side} to training is {largest:.3f}"


def test_the_largest_similarity_is_that_of_the_nearest_pair() -> None:
    held, trained = ["one two three", LONG], ["four five six", LONG + " or so"]
    expected = similarity(shingles(LONG), shingles(LONG + " or so"))
    assert largest_similarity(held, trained) == expected > 0.5


@pytest.mark.parametrize("side", ["valid", "test"])
def test_every_builtin_fact_that_is_asked_was_taught(builtin: Examples, side: str) -> None:
    taught = {e.group for e in builtin.train}
    asked = {e.group for e in builtin.by_name()[side]} - {None}
    assert asked
    assert asked <= taught


def test_the_builtin_wordings_of_one_side_occur_on_no_other(raw: dict[str, list[dict[str, Any]]]) -> None:
    families = {name: {row["wording"] for row in rows} - {"off_desk"} for name, rows in raw.items()}
    assert all(families.values())
    assert all(not families[one] & families[other] for one, other in combinations(SPLITS, 2)), families


def test_every_builtin_answer_passes_its_own_check(builtin: Examples) -> None:
    rows = [e for side in builtin.by_name().values() for e in side]
    wrong = [e.where for e in rows if e.check is None or not is_right(e.answer, e.check)]
    assert wrong == []


def test_the_builtin_files_are_what_their_script_writes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_builtin_data.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prompts_that_differ_in_a_repeated_sign_alone_are_two_questions() -> None:
    few = example("How many zeros are in 100000?", "train:1", "Five.")
    many = example("How many zeros are in 1000000?", "test:1", "It is six.")
    assert np.array_equal(shingles(few.question), shingles(many.question))
    assert require_apart(Examples((few,), (), (many,))) == 1


def lines(n: int, first: int = 0) -> list[Example]:
    """Answers of their own to one request."""
    return [example("Write a line.", f"x:{i}", words(random.Random(first + i))) for i in range(n)]


def test_where_all_ask_one_thing_the_answers_are_split() -> None:
    split = complete(Examples((*lines(20), *lines(20)))).by_name()
    answers = {name: {one.answer for one in held} for name, held in split.items()}
    assert all(answers.values())
    assert not any(a & b for a, b in combinations(answers.values(), 2))


def test_where_all_ask_one_thing_an_answer_on_two_sides_is_a_leak() -> None:
    require_apart(Examples(tuple(lines(12)), (), tuple(lines(3, 100))))
    with pytest.raises(DataError, match="near-identical to x:5 in train"):
        require_apart(Examples(tuple(lines(12)), (), (example("Write a line.", "y:1", lines(12)[5].answer),)))


def test_large_groups_are_held_out_no_sooner_than_small_ones() -> None:
    """Of a draw for each example, the least would put groups of many first, and leave few that are independent."""
    large = [example(f"{name} {i}", group=name) for name in map(str, range(20)) for i in range(50)]
    single = [example(f"alone {i} {i * i}") for i in range(2000)]
    split = complete(Examples((*large, *single)))
    held = (*split.valid, *split.test)
    apart = len({one.group or one.question for one in held}) / len(held)
    assert apart > 0.4, "two thirds of all examples are alone, and by the least draw a tenth of those held out"
