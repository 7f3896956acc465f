"""The demo that `python -m gradsurg` runs: its training job, and the table and picture of the results."""
