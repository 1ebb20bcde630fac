"""A simple classifier to compare with: TF-IDF and logistic regression, if scikit-learn is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from lorafit.data.equality import key_of
from lorafit.data.examples import Example

MOST_ANSWERS = 200  # different answers: a model is fitted for each
MOST_EXAMPLES, MOST_FEATURES, MOST_CHARACTERS = 4_000, 20_000, 1_000  # of the training set: 200 MB at most
MOST_WORK = 4_000_000  # examples × different answers × characters of a question: 1 to 5 seconds of one core
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Classified:
    """The result of the classifier.

    Args:
        answers: An answer to each question; None if there is no classifier.
        missing: Why there is none.
        learnt: How many examples it has learnt from.
    """

    answers: list[str] | None
    missing: str | None = None
    learnt: int = 0


def classified(known: Sequence[Example], asked: Sequence[Example]) -> Classified | None:
    """Answer each question in `asked` with one of the answers in `known`. If the classifier fails, nothing is raised;
    the result says why.

    Args:
        known: Examples to learn from. If there are too many for MOST_WORK, only some are used, spread evenly.
        asked: Examples whose questions are answered.

    Returns:
        The result; None if the examples have only one answer, or too many different ones.
    """
    kinds = len({key_of(example) for example in known})
    if not asked or not 2 <= kinds <= MOST_ANSWERS:
        return None
    if not is_installed():
        return Classified(None, NOT_INSTALLED)
    characters = max(1, sum(len(_asked(example)) for example in known) // len(known))
    n = min(len(known), MOST_EXAMPLES, MOST_WORK // (kinds * characters))
    if n < min(len(known), 2 * kinds):
        return Classified(None, f"{kinds} answers to questions of {characters} characters would take it too long")
    known = [known[i * len(known) // n] for i in range(n)]
    try:
        return Classified(_answers(known, asked), learnt=n)
    except Exception as error:  # after hours of training, a library that only adds a score must not end the run
        return Classified(None, f"it failed ({type(error).__name__}: {error})")


def _answers(known: Sequence[Example], asked: Sequence[Example]) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    wanted = [key_of(example) for example in known]
    # Pieces of words rather than words: they serve languages that put no space between them.
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=MOST_FEATURES)
    model = OneVsRestClassifier(LogisticRegression(C=10, solver="liblinear", random_state=0))
    model.fit(features.fit_transform([_asked(example) for example in known]), wanted)
    spelt: dict[str, Counter[str]] = {}
    for example, key in zip(known, wanted, strict=True):
        spelt.setdefault(key, Counter())[example.answer] += 1
    predicted = model.predict(features.transform([_asked(example) for example in asked]))
    return [spelt[str(key)].most_common(1)[0][0] for key in predicted]


def _asked(example: Example) -> str:
    """The end of the text before the answer, where the question is."""
    return example.question[-MOST_CHARACTERS:]


def is_installed() -> bool:
    return find_spec("sklearn") is not None
