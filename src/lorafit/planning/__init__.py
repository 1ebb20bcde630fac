"""Planning: rules that return resolved numbers, each with its reason in plain words."""

from lorafit.planning.rules import Choice, Decision, decide

__all__ = ["Choice", "Decision", "decide"]
