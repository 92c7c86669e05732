#!/usr/bin/env bash
# RAMoLE beside what it is compared with, on tiny/: trains the gates over the fixed pool that it lacks, then prints the
# README's tables: each task with its own adapter in the pool, without it, and tasks that come later.
#   runs/ramole.sh [FOLDER]    a folder that runs/cpu.sh made; default: tiny
set -euo pipefail
cd "$(dirname "$0")/.."
tiny=${1:-tiny}
out=out/ramole
later=out/ramole-later
tasks=out/tiny_tasks
python tiny_tasks.py --out $tasks
for pool in $out $later; do
    mkdir -p $pool
    cp -r "$tiny/." $pool
done

# $1 the pool, $2 the share of its tasks that gates learn from
gates() {
    run=(--model "$1" --tasks $tasks --pool "$1" --share "$2" --batch_size 28 --steps 300)
    for k in 1 3; do
        python train.py gates "${run[@]}" --kind moe --top_k $k
    done
    for kind in soft smear; do
        python train.py gates "${run[@]}" --kind $kind --clip 1
    done
}

gates $out 1
for ood in "" --ood; do
    python train.py lorahub --model $out --pool $out --tasks $tasks --max_length 1024 $ood
done
methods=base,oracle,ramole,selection,mixture,fusion,adaptersoup,logo,meteora_top1,meteora_top2,soft,moe_top1,moe_top3,\
smear,arrow,lorahub,uniform
for setting in "" --ood; do
    python eval.py --model $out --out "$out-eval$setting" $setting --methods $methods
done

# Eleven tasks come first, and router and gates are trained on them as the retriever was; the other adapters join later.
gates $later 0.4
for k in 1 2; do
    python train.py gates --model $later --tasks $tasks --pool $later --share 0.4 --top_k $k --batch_size 28 --steps 300
done
python train.py router --model $later --tasks $tasks --pool $later --prior 0.07 --divisor 1 --steps 400
python eval.py --model $later --out "$later-eval" --unseen --methods ${methods/,lorahub/}
