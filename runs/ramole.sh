#!/usr/bin/env bash
# RAMoLE beside what it is compared with, on tiny/: trains the gates over the fixed pool that it lacks, then prints the
# tables of docs/results.md: each task with its own adapter in the pool, without it, and tasks that come later.
#   runs/ramole.sh [FOLDER]    a folder that runs/cpu.sh made; default: tiny
set -euo pipefail
cd "$(dirname "$0")/.."
tiny=${1:-tiny}
out=out/ramole
later=out/ramole-later
tasks=out/tiny_tasks
python -m tasks.tiny --out $tasks
for pool in $out $later; do
    mkdir -p $pool
    cp -r "$tiny/." $pool
done

run=(--model $out --tasks $tasks --pool $out --batch_size 28 --steps 300)
for k in 1 3; do
    python train.py gates "${run[@]}" --kind moe --top_k $k
done
for kind in soft smear; do
    python train.py gates "${run[@]}" --kind $kind --clip 1
done
for ood in "" --ood; do
    python train.py lorahub --model $out --pool $out --tasks $tasks --max_length 1024 $ood
done
for setting in "" --ood; do
    python eval.py --model $out --out "$out-eval$setting" $setting --methods \
base,oracle,ramole,selection,mixture,fusion,adaptersoup,logo,meteora_top1,meteora_top2,soft,moe_top1,moe_top3,smear,\
arrow,lorahub,uniform
    python eval.py --model $out --out "$out-eval-28$setting" $setting --retrieve 28 --methods ramole
done

# Retriever and router know 11 tasks; the adapters of the other 17 join after them, and these are asked for.
python train.py router --model $later --tasks $tasks --pool $later --share 0.4 --retrieve 11 --drop 0.3 --r 16 \
    --prior 0.1 --divisor 1 --steps 400
python eval.py --model $later --out "$later-eval" --unseen --methods base,oracle,ramole,selection,mixture,fusion,uniform
