"""Tools that inspect compiled kernels; nothing here is needed at run time."""
