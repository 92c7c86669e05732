"""Programs to start your own from: python -m examples.NAME."""
