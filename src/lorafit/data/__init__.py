"""Examples: reading, checking, splitting, rendering, batching. No model is opened here."""
