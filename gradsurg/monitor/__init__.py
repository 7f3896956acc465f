"""What many steps did: histories, files, plots, loggers and advice."""
