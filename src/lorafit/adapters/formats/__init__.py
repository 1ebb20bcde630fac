"""File formats of adapters. One file per format: `write` and `read`."""
