"""Adapters: PEFT folders in and out, the slots of a pool, its gates' files, its retriever."""
