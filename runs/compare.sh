#!/usr/bin/env bash
# Everything that MeteoRA stands beside, on tiny/: trains what it lacks, then prints the README's tables. Goes on where
# it was.
#   runs/compare.sh [FOLDER]    a folder that runs/cpu.sh made; default: out/tiny
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/tiny}
tasks=out/tiny_tasks

python tiny_tasks.py --out $tasks
pool=(--model "$out" --pool "$out" --tasks $tasks --save_dtype bfloat16 --resume)
for joint in lora_f lora_b; do # as many parameters as the 28 adapters
    python train.py adapters "${pool[@]}" --steps 200 --lr 1e-3 --joint $joint --name ${joint}_224 --r 224 --alpha 448
done
for kind in soft loraflow smear; do
    python train.py gates "${pool[@]}" --batch_size 28 --steps 500 --clip 1 --kind $kind
done
python train.py lorahub --model "$out" --pool "$out" --tasks $tasks
python eval.py --model "$out" --out "$out-compare" --composite 3,5,10 --composite_temperature 1,5,15 --methods \
base,oracle,lora_f,lora_b,lora_f_224,lora_b_224,uniform,average_ab,ties_ab,ties_ba,dare_ab,dare_ba,svd,lorahub,arrow,\
smear,loraflow,soft,meteora_top1,meteora_top2
