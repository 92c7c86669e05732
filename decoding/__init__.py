"""Sampling, the decode loop, answers as text, lines of JSON or pages, the interactive prompt; and
what else generate.py does with a pool: making one of PEFT folders, exporting a mixture."""
