"""The jobs behind the verbs, a file for each."""
