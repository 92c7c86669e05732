#!/usr/bin/env bash
# Makes tiny/, the embedded default, from nothing, on two CPU cores. Killed, it goes on where it was.
#   runs/cpu.sh [FOLDER]        default: out/tiny
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/tiny}
tasks=out/tiny_tasks

python -m tasks.tiny --out $tasks
python train.py base --text $tasks/corpus.txt --model "$out" --dtype bfloat16 --resume
run=(--model "$out" --tasks $tasks --save_dtype bfloat16 --max_length 1024 --resume)
# Adapters as they come, each trained on its task alone; then gates, and the adapters with them, on composites too.
python train.py adapters "${run[@]}" --pool "$out-alone" --steps 200 --lr 2e-3 --late_start 0.7
gates=(--batch_size 84 --composite 0.67 --optimizer muon --lr 0.1 --clip 0)
python train.py gates "${run[@]}" "${gates[@]}" --pool "$out-alone" --adapters_too "$out" --adapter_lr 1e-3 \
    --top_k 1 --steps 500 --beta 1
python train.py gates "${run[@]}" "${gates[@]}" --pool "$out" --top_k 2 --steps 300 --beta 2
# Adapters found for a prompt, and what weighs them: the retriever from 11 of the tasks, the router from all 28.
[ -e "$out/retriever.safetensors" ] || python train.py retriever --model "$out" --tasks $tasks --pool "$out" \
    --share 0.4 --test
python train.py router "${run[@]}" --pool "$out" --dtype float32 --share 1 --retrieve 28 --drop 0.3 --r 16 \
    --prior 0.1 --divisor 1 --steps 1800
# What they are compared with: one adapter of the same rank, from as many examples, as many of them in composites.
for joint in lora_f lora_b; do
    python train.py adapters "${run[@]}" --pool "$out" --joint $joint --steps 388 --lr 5e-3 --composite 0.32
done
python eval.py --model "$out" --out "$out-eval" --composite 3,5,10 \
    --methods base,oracle,meteora_top1,meteora_top2,lora_f,lora_b
