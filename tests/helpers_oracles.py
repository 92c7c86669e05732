"""transformers and peft as a user has them: imported without the repository, whose kernels.py has a
package's name."""

import torch

from evaluation.peers import repository_off_path

with repository_off_path():
    import peft
    import transformers
    from peft import PeftModel
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.utils import merge_utils
    from transformers import LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

__all__ = [
    "LlamaForCausalLM",
    "LlamaTokenizer",
    "PeftModel",
    "PreTrainedTokenizerFast",
    "create_arrow_model",
    "generate_merges",
    "merge_utils",
    "peft",
    "peft_logits",
    "transformers",
]


def peft_logits(model, ids, adapter=None):
    """transformers' logits of the model folder, float32; with an `adapter` folder PEFT's."""
    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        llama = PeftModel.from_pretrained(llama, adapter)
    with torch.no_grad():
        return llama.eval()(ids).logits
