"""Attaching adapters to a base. This is the only folder that changes a model."""
