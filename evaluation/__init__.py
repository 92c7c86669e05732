"""Answers to tasks and composites, how they are scored, and what bench.py times."""
