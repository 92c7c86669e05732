#!/usr/bin/env bash
# Makes tiny/, the embedded default, from nothing: about an hour on two CPU cores. Killed, it goes on where it was.
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
for k in 1 2; do
  python train.py gates --model "$out" --pool "$out" --tasks $tasks --top_k $k \
    --steps 1000 --batch_size 32 --save_dtype bfloat16 --resume
done
python eval.py --model "$out" --out "$out-eval" --methods base,oracle,meteora_top1,meteora_top2
