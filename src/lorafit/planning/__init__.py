"""Rules that choose the numbers of a run, each with its reason in a sentence."""

from lorafit.planning.rules import Choice, Decision, decide

__all__ = ["Choice", "Decision", "decide"]
