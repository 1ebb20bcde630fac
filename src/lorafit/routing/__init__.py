"""The router: hidden states of the base go in, and the adapter that a question belongs to comes out."""

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
