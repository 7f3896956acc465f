"""Several ranks: torch.distributed as it is, made exact for task gradients."""
