"""The guide: pages on what LoRA is and how to use it well, and the search that answers questions from them."""
