"""Tasks: what is predicted and how it is scored. One file per task."""
