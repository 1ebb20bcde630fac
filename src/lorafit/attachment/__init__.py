"""Attaching: the only folder that touches a model."""
