"""All that is there for speed alone: fast.install(model) makes a Llama fast; without this folder all runs, slower."""

from fast.model import install

__all__ = ["install"]
