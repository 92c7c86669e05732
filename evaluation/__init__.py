"""Answering composites, and what bench.py times."""
