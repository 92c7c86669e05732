"""What is there for speed alone: fast.install(model) makes a Llama fast.

Without this folder everything but bench.py runs, slower.
"""

from fast.model import install

__all__ = ["install"]
