"""How answers are scored, each number with its 95 % interval over independent sources (documents, articles, inputs)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import textstat
from sacrebleu.metrics.bleu import BLEU

from lorafit.data.split import FEWEST
from lorafit.evaluation.statistics import paired_bootstrap

RESAMPLES = 2_000  # of BLEU, which is no mean: a resample sums its n-gram counts anew


@dataclass(frozen=True)
class Scored:
    """A score and its interval; no interval where there are fewer than ten independent sources."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.interval is None else " ({:.1f} to {:.1f})".format(*self.interval))

    def signed(self, digits: int) -> str:
        """As a difference is written."""
        ends = () if self.interval is None else tuple(f"{end:+.{digits}f}" for end in self.interval)
        return f"{self.value:+.{digits}f}" + (f" ({' to '.join(ends)})" if ends else "")


def mean(values: Sequence[float], groups: Sequence[str | None] | None) -> Scored:
    """Mean of one number per answer; answers to one source are drawn together (None: each its own)."""
    found = paired_bootstrap(values, groups)
    return Scored(float(np.mean(values)), (found.low, found.high) if found else None)


def gain(values: Sequence[float], over: Sequence[float], groups: Sequence[str | None] | None) -> Scored:
    """Mean paired difference of two answers to the same question."""
    return mean([a - b for a, b in zip(values, over, strict=True)], groups)


def tokens(text: str) -> list[str]:
    """Lower-cased runs of letters and digits; no stemming, no stop words."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_1(answer: str, reference: str) -> float:
    """100 × F1 of the words two texts share, each counted as often as both have it (Lin 2004)."""
    said, wanted = tokens(answer), tokens(reference)
    return _f1((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))


def rouge_l(answer: str, *references: str) -> float:
    """100 × F1 of the longest common subsequence of words (Lin 2004); of several references the best counts."""
    said = tokens(answer)
    wanted = [tokens(reference) for reference in references]
    return max(_f1(_common(said, one), len(said), len(one)) for one in wanted)


def _f1(hits: int, n_said: int, n_wanted: int) -> float:
    return 200 * hits / (n_said + n_wanted) if hits else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Corpus BLEU-4 by the rules of e2e-metrics: mteval-v13a tokens, case ignored, no smoothing, several references,
    the length of the closest of them. Every answer counts as one source."""
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none", effective_order=True)
    each = [metric.sentence_score(a, list(r)) for a, r in zip(answers, references, strict=True)]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in each])

    def of(sums: Sequence[int]) -> float:
        found = BLEU.compute_bleu(list(sums[:4]), list(sums[4:8]), sums[8], sums[9], smooth_method="none")
        return float(found.score)

    value = of(counts.sum(axis=0).tolist())
    if len(answers) < FEWEST:
        return Scored(value, None)
    drawn = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.quantile([of(counts[one].sum(axis=0).tolist()) for one in drawn], [0.025, 0.975])
    return Scored(value, (float(low), float(high)))


def grade(text: str) -> float:
    """Flesch-Kincaid grade: years of schooling in the US that the lengths of its sentences and words ask for."""
    return float(textstat.textstat.flesch_kincaid_grade(text))


def words(text: str) -> int:
    return len(text.split())


def share_from(answer: str, source: str) -> float:
    """Per cent of an answer's words that its source has, too: 100 says nothing in words of its own."""
    said, known = tokens(answer), set(tokens(source))
    return 100 * sum(word in known for word in said) / len(said) if said else 0.0
