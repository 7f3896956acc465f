"""Keeps the promise for the movement that the parameters really made."""
