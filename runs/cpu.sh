#!/usr/bin/env bash
# Makes tiny/, the embedded default, from nothing, on two CPU cores. Killed, it goes on where it was.
#   runs/cpu.sh [FOLDER]        default: out/tiny
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/tiny}
tasks=out/tiny_tasks

python tiny_tasks.py --out $tasks
python train.py base --text $tasks/corpus.txt --model "$out" --dtype bfloat16 --resume
pool=(--model "$out" --pool "$out" --tasks $tasks --save_dtype bfloat16 --resume)
python train.py adapters "${pool[@]}" --steps 200 --lr 2e-3
# Top-1 gates learn from the gate term alone; top-2 gates answer better where the LM loss has more of a say (LOG.md).
python train.py gates "${pool[@]}" --batch_size 28 --top_k 1 --steps 1000
python train.py gates "${pool[@]}" --batch_size 28 --top_k 2 --steps 1000 --beta 2 --clip 1
python eval.py --model "$out" --out "$out-eval" --methods base,oracle,meteora_top1,meteora_top2
