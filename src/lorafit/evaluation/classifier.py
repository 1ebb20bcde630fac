"""A simple classifier to compare with: TF-IDF and logistic regression, where scikit-learn is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from lorafit.data.equality import compared
from lorafit.data.examples import Example

MOST_ANSWERS = 200  # different ones: a model is fitted for each
MOST_EXAMPLES, MOST_FEATURES, MOST_CHARACTERS = 4_000, 20_000, 1_000  # what is learnt from: seconds, and 200 MB


def classified(known: Sequence[Example], asked: Sequence[Example]) -> list[str] | None:
    """One of the answers in `known` for each question in `asked`.

    Args:
        known: examples to learn from; of many MOST_EXAMPLES, spread.
        asked: examples whose questions are answered.

    Returns:
        None where scikit-learn is not installed (`is_installed`), or the examples give nothing to tell apart.
    """
    known = known[:: -(-len(known) // MOST_EXAMPLES)] if known else known
    wanted = [compared(example.answer) for example in known]
    if not asked or not 2 <= len(set(wanted)) <= MOST_ANSWERS:
        return None
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
    except ImportError:
        return None
    # Pieces of words rather than words: they serve languages that put no space between them.
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=MOST_FEATURES)
    model = OneVsRestClassifier(LogisticRegression(C=10, solver="liblinear", random_state=0))
    model.fit(features.fit_transform([_asked(example) for example in known]), wanted)
    spelt: dict[str, Counter[str]] = {}
    for example, key in zip(known, wanted, strict=True):
        spelt.setdefault(key, Counter())[example.answer] += 1
    found = model.predict(features.transform([_asked(example) for example in asked]))
    return [spelt[str(key)].most_common(1)[0][0] for key in found]


def _asked(example: Example) -> str:
    """The end of what comes before the answer, where the question stands."""
    return example.question[-MOST_CHARACTERS:]


def is_installed() -> bool:
    return find_spec("sklearn") is not None
