"""The only code that reads or writes as many numbers as there are parameters."""
