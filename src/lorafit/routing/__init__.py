"""Which adapter a question is for: read off the base's hidden states, by a classifier trained in seconds."""

from lorafit.routing.features import LONGEST, Features, depths, features_of, pooled, question_of, token_ids
from lorafit.routing.router import Routed, Router, elsewhere, fit, fitting, key_of, learnable

__all__ = [
    "LONGEST",
    "Features",
    "Routed",
    "Router",
    "depths",
    "elsewhere",
    "features_of",
    "fit",
    "fitting",
    "key_of",
    "learnable",
    "pooled",
    "question_of",
    "token_ids",
]
