"""Training quality, honestly: real data, the same search for every method, single-task runs as base."""
