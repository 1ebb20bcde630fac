"""What people read of a run: the model card (the html report comes on top of the same records)."""
