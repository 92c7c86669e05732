"""transformers and peft as a user has them: imported without the repository, whose kernels.py has a
package's name."""

from evaluation.peers import repository_off_path

with repository_off_path():
    import peft
    import transformers
    from peft import PeftModel
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.utils import merge_utils
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "LlamaForCausalLM",
    "PeftModel",
    "PreTrainedTokenizerFast",
    "create_arrow_model",
    "merge_utils",
    "peft",
    "transformers",
]
