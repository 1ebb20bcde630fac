"""A language that a base was not made from is told by the tokens that its words take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from conftest import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorafit.data.examples import Example, Message
from lorafit.data.languages import LOOKED_AT, strange_language, tokens_a_word
from lorafit.evaluation.forgetting import general_text

ENGLISH = "\n".join(general_text()[1])
RUSSIAN = "Заказ пришёл сегодня утром, но две лампы были разбиты, и их надо вернуть до выходных."
CHINESE = "订单今天早上到了，但是有两盏灯坏了，我想在周末之前把它们退回去。"


def trained_on(text: str) -> Any:
    """A tokenizer that knows the words of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def english() -> Any:
    return trained_on(ENGLISH)


def examples(answers: Sequence[str]) -> list[Example]:
    return [Example((Message("user", "?"), Message("assistant", text)), f"x:{i}") for i, text in enumerate(answers, 1)]


@pytest.mark.parametrize("text", [RUSSIAN, CHINESE])
def test_a_language_that_the_base_hardly_knows_is_remarked_with_its_first_example(english: Any, text: str) -> None:
    said = strange_language(english, examples([ENGLISH[:300], text, text]), ENGLISH)
    assert said is not None
    assert said.startswith("2 of 3 examples that were looked at")
    assert "first x:2: " in said


def test_what_the_base_was_made_from_is_not_remarked(english: Any) -> None:
    assert strange_language(english, examples([ENGLISH[i : i + 300] for i in range(0, 1500, 300)]), ENGLISH) is None
    assert strange_language(trained_on(50 * RUSSIAN), examples([RUSSIAN] * 3), ENGLISH) is None


def test_a_base_that_reads_single_bytes_knows_no_language_better(english: Any) -> None:
    assert strange_language(byte_tokenizer(), examples([ENGLISH[:300]]), ENGLISH) is None


def test_signs_digits_and_a_few_foreign_words_are_no_language(english: Any) -> None:
    answers = ['{"a": [1, 2, 3], "b": 4}', "да", "12 + 5 = 17", *[ENGLISH[:300]] * 20, RUSSIAN]
    assert strange_language(english, examples(answers), ENGLISH) is None


def test_of_many_examples_some_spread_over_all_are_looked_at(english: Any) -> None:
    said = strange_language(english, examples([RUSSIAN] * 5 * LOOKED_AT), ENGLISH)
    assert said is not None
    assert said.startswith(f"{LOOKED_AT} of {LOOKED_AT} ")


def test_tokens_are_counted_for_each_word_of_letters_alone(english: Any) -> None:
    assert tokens_a_word(english, "7 8 9 !? one") is None
    plain = tokens_a_word(english, "the order arrived in the morning and was sent back")
    assert plain == tokens_a_word(english, "the order, arrived: [in] the (morning) 123 and was sent back!!")
