"""The ways to choose adapters, and the training of what chooses."""
