"""The peer of bench/routing.py: logistic regression on TF-IDF of words and pairs of words, by scikit-learn.

Reads one JSON object: train, valid, test (texts and labels), others; prints each text's probabilities.
"""

from __future__ import annotations

import json
import sys

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

job = json.load(sys.stdin)
texts, labels = job["train"]
best = None
for strength in (1.0, 10.0, 100.0):  # the best of them on validation
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=strength, max_iter=2000, class_weight="balanced"),
    ).fit(texts, labels)
    right = model.score(*job["valid"])
    if best is None or right > best[0]:
        best = right, model
assert best is not None
found = {name: best[1].predict_proba(asked).tolist() for name, asked in job["ask"].items()}
print(json.dumps({"version": sklearn.__version__, "found": found}))
