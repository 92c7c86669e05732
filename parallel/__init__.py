"""More than one process under torchrun: applied from outside, so model.py and moe_lora.py don't know of it."""
