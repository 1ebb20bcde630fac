"""Decoding for evaluation and chat."""
