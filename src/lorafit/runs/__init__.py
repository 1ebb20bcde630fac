"""Runs: what is in their folder, and what came of them."""
