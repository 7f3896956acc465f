"""The demonstration that `python -m gradsurg` runs."""
