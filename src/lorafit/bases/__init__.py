"""Bases: where they come from, how they are opened, and what tells one from another."""
