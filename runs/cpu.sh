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
adapters=(--steps 200 --lr 2e-3)
python train.py adapters "${pool[@]}" "${adapters[@]}" --late 0.7
# What MeteoRA is compared with: one adapter of the same rank that learns all tasks, from as many examples.
python train.py adapters "${pool[@]}" "${adapters[@]}" --joint lora_f
python train.py adapters "${pool[@]}" "${adapters[@]}" --joint lora_b
gates=(--batch_size 28 --optimizer muon --lr 0.3 --clip 0)
python train.py gates "${pool[@]}" "${gates[@]}" --top_k 1 --steps 1500
python train.py gates "${pool[@]}" "${gates[@]}" --top_k 2 --steps 1000 --beta 2
python eval.py --model "$out" --out "$out-eval" --methods base,oracle,meteora_top1,meteora_top2,lora_f,lora_b
