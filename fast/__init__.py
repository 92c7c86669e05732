"""All that is there for speed alone."""
