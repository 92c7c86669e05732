"""Task folders, the embedded tasks, metrics."""
