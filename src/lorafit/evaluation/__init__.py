"""Evaluation: NLL per example, answers checked against facts, paired statistics."""
