#!/usr/bin/env bash
# RAMoLE beside what it is compared with, on tiny/: trains the gates over the fixed pool that it lacks, then prints the
# README's table, each task with its own adapter in the pool and without it.
#   runs/ramole.sh [FOLDER]    a folder that runs/cpu.sh made; default: tiny
set -euo pipefail
cd "$(dirname "$0")/.."
tiny=${1:-tiny}
out=out/ramole
tasks=out/tiny_tasks

python tiny_tasks.py --out $tasks
mkdir -p $out
cp -r "$tiny/." $out
run=(--model $out --tasks $tasks --pool $out --batch_size 28 --steps 300)
for k in 1 3; do
    python train.py gates "${run[@]}" --kind moe --top_k $k
done
for kind in soft smear; do
    python train.py gates "${run[@]}" --kind $kind --clip 1
done
python train.py lorahub --model $out --pool $out --tasks $tasks --max_length 1024
for setting in "" --ood; do
    python eval.py --model $out --out "$out-eval$setting" $setting --methods \
base,oracle,ramole,selection,mixture,fusion,adaptersoup,logo,meteora_top1,meteora_top2,soft,moe_top1,moe_top3,smear,\
arrow,lorahub,uniform
done
