"""Bases: where they come from, how they are opened, and their fingerprints."""
