"""Decoding with transformers' generate, and text from tokens."""
