#!/usr/bin/env bash
# The figures of docs/own_adapters.md: five adapters that PEFT trains, of different Linears, ranks and templates, and how
# well each method chooses among them.
#
#     runs/own_adapters.sh MODEL TASKS [OUT]
#
# MODEL: SmolLM2-135M-Instruct as a Hugging Face folder. TASKS: task folders. Needs transformers and peft.
set -euo pipefail
model=$(realpath "${1:?a model folder}")
tasks=$(realpath "${2:?a folder of task folders}")
cd "$(dirname "$0")/.."
out=$(realpath -m "${3:-out/own_adapters}")
names="past_tense question_formation sentiment_multiemo_en implicatures intent_recognition"
mkdir -p "$out/pool"

# From another folder: transformers looks for a package called kernels, and here is a file of that name.
(cd "$out" && python - "$model" "$tasks" pool <<'PYTHON'
import json
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tasks, pool = sys.argv[1:]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
INST = "[INST] {prompt} [/INST]\n"
# {task: (template, r, alpha, rsLoRA, Linears, steps, examples a step)}
ADAPTERS = {
    "past_tense": ("chat", 4, 8, False, ATTENTION + MLP, 150, 8),
    "question_formation": ("chat", 8, 16, False, ["q_proj", "v_proj"], 150, 8),
    "sentiment_multiemo_en": ("chat", 16, 16, True, ATTENTION, 90, 4),
    "implicatures": (INST, 8, 16, False, ATTENTION + MLP, 100, 4),
    "intent_recognition": ("chat", 8, 32, False, MLP, 70, 3),
}
tokenizer = AutoTokenizer.from_pretrained(model)


def encode(template, row):
    """Prompt and response as token ids."""
    asked = [{"role": "user", "content": row["prompt"]}]
    text = template.replace("{prompt}", row["prompt"])
    if template == "chat":
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    return prompt, [*response, tokenizer.eos_token_id]


torch.manual_seed(0)
for name, (template, r, alpha, rslora, linears, steps, count) in ADAPTERS.items():
    rows = [json.loads(line) for line in open(Path(tasks, name, "train.jsonl"))]
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": linears}
    llama = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", **options))
    params = [param for param in llama.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    rng = random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        pairs = [encode(template, row) for row in rng.sample(rows, count)]
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        ids = torch.full((count, longest), tokenizer.eos_token_id)
        labels = torch.full((count, longest), -100)
        mask = torch.zeros(count, longest, dtype=torch.int64)
        for j, (prompt, response) in enumerate(pairs):
            end = len(prompt) + len(response)
            ids[j, :end] = torch.tensor(prompt + response)
            labels[j, len(prompt) : end] = torch.tensor(response)
            mask[j, :end] = 1
        llama(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    llama.save_pretrained(f"{pool}/{name}")
PYTHON
)

samples=()
rm -f "$out/examples.jsonl" "$out/test.jsonl"
for name in $names; do
    head -5 "$tasks/$name/train.jsonl" > "$out/$name.jsonl"
    samples+=(--samples "$name=$out/$name.jsonl")
    add="import json, sys; [print(json.dumps({'adapter': '$name', **json.loads(line)})) for line in sys.stdin]"
    head -32 "$tasks/$name/train.jsonl" | python -c "$add" >> "$out/examples.jsonl"
    head -10 "$tasks/$name/test.jsonl" | python -c "$add" >> "$out/test.jsonl"
done
python generate.py --init --model "$model" --pool "$out/pool" --chat "${samples[@]}"
for part in gates router; do
    python train.py $part --model "$model" --pool "$out/pool" --tasks "$out/examples.jsonl" --steps 60 --batch_size 10
done
python eval.py --model "$model" --pool "$out/pool" --tasks "$out/test.jsonl" --max_new_tokens 32 --out "$out/report" \
    --methods base,oracle,uniform,arrow,logo_top1,selection,meteora,ramole
