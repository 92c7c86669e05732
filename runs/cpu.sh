#!/usr/bin/env bash
# Makes tiny/, the embedded default, from nothing: roughly an hour on two CPU cores. Killed, it goes on where it was.
#   runs/cpu.sh [FOLDER]        default: out/tiny
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/tiny}
tasks=out/tiny_tasks
# Eight of the 28 that tiny_tasks.py can make, of seven families.
names=(reverse_word upper_case sort_list add number_to_words german plural capital)

python tiny_tasks.py --out $tasks
python train.py base --text $tasks/corpus.txt --model "$out" --dtype bfloat16 --resume
python train.py adapters --model "$out" --pool "$out" --tasks $tasks "${names[@]/#/--only=}" \
  --steps 300 --lr 2e-3 --save_dtype bfloat16 --resume
# Top-1 gates learn from the gate term alone; top-2 gates answer better where the LM loss has more of a say (LOG.md).
gates=(python train.py gates --model "$out" --pool "$out" --tasks $tasks --batch_size 32 --save_dtype bfloat16 --resume)
"${gates[@]}" --top_k 1 --steps 1000
"${gates[@]}" --top_k 2 --steps 800 --beta 2 --clip 1
python eval.py --model "$out" --out "$out-eval" --methods base,oracle,meteora_top1,meteora_top2
