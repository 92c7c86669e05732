"""Sampling, the decode loop, answers as text, lines of JSON or pages, the interactive prompt."""
