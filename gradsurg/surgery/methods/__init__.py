"""One file per published surgery."""
