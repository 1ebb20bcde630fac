"""Adapters as values: a plan, its tensors, the rendering they were trained with, and the folder they are kept in."""
