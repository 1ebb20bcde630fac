"""Training: mutable state, the loop, checkpoints."""
