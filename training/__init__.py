"""What trainers share, and the training of a base and of adapters."""
