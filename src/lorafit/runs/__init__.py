"""Runs: the files of their folder, and their results."""
