"""Options that save backward passes: features=, refresh_every= and batched=."""
