"""transformers and PEFT, asked what a damaged model or adapter folder answers: greedy, float32.

They run in a process of their own, which a damaged file may stop, with limits as the program's.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise

from fuzz.plan import Plan

ORACLE = """
import json, os, resource, signal, sys
import torch, transformers
from peft import PeftModel
FLOATS = {"rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
UNUSED = {"bos_token_id", "pad_token_id"}
transformers.logging.set_verbosity_error()

def encode(tokenizer, prompt, chat):
    if not chat:
        return tokenizer(prompt).input_ids
    said = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids

def with_floats(value):
    # transformers insists on 1.0 where 1 is as good a number, and on the types of what isn't used
    return {name: float(x) if name in FLOATS and type(x) is int else with_floats(x) if type(x) is dict else x
            for name, x in value.items() if name not in UNUSED}

def write_floats(model):
    value = read_json(f"{model}/config.json")
    if "eos_token_id" in read_json(f"{model}/generation_config.json"):
        value.pop("eos_token_id", None)  # isn't used
    if value:
        json.dump(with_floats(value), open(f"{model}/config.json", "w"))

def read_json(file):
    try:
        value = json.load(open(file))
    except Exception:
        return {}  # let transformers say what is wrong
    return value if type(value) is dict else {}

@torch.no_grad()
def answer(model, adapter, prompt, chat, n):
    write_floats(model)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    how = {"dtype": torch.float32, "output_loading_info": True}
    llama, info = transformers.LlamaForCausalLM.from_pretrained(model, **how)
    if lacks := [name for name in ("missing_keys", "mismatched_keys") if info[name]]:
        raise ValueError(f"{lacks[0]}: {sorted(map(str, info[lacks[0]]))[:3]}")
    ends = llama.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    if adapter:
        llama = PeftModel.from_pretrained(llama, adapter)
    prompt = encode(tokenizer, prompt, chat)
    ids = list(prompt)
    for _ in range(n):
        logits = llama.eval()(torch.tensor([ids])).logits[0, -1]
        if not logits.isfinite().all():
            raise ValueError("logits that aren't finite")
        if int(logits.argmax()) in ends:
            break
        ids.append(int(logits.argmax()))
    return [prompt, ids[len(prompt):]]

def serve(given, out):
    signal.alarm(30)
    resource.setrlimit(resource.RLIMIT_CPU, (20, 21))
    os.chdir(given.pop("folder"))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        said = answer(**given)
    except BaseException as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
    os.write(out, json.dumps(said).encode())
    os._exit(0)

for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
        serve(json.loads(line), write)
    os.close(write)
    said = b"".join(iter(lambda: os.read(read, 65536), b""))
    os.close(read)
    os.wait()
    print(said.decode() or json.dumps("it ended without an answer"), flush=True)
"""


class Oracle:
    """Starts when it is first asked, or before: importing takes seconds."""

    def __init__(self):
        self.process = None

    def start(self) -> None:
        """Begins to import transformers."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("PYTHONPATH", None)  # the repository's kernels.py has a package's name
        line = [sys.executable, "-c", ORACLE]
        quiet = {"stdin": -1, "stdout": -1, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(line, cwd="/", env=environment, **quiet)

    def __call__(self, plan: Plan) -> list | str:
        """[ids of the prompt, ids of the answer], or why there is no answer."""
        if not self.process:
            self.start()
        of = dict(pairwise(plan.argv))  # {option: its value}, and pairs that nobody asks for
        asked = {"folder": str(plan.folder), "model": of["--model"], "prompt": of["--prompt"]}
        asked |= {"chat": "--chat" in plan.argv, "n": int(of["--max_new_tokens"])}
        asked |= {"adapter": of.get("--adapter", "=").partition("=")[2]}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends its process."""
        if self.process:
            self.process.kill()
            self.process.wait()
