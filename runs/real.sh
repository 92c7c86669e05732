#!/usr/bin/env bash
# RAMoLE with a real model on real tasks: twelve adapters of five families, retriever and router tuned on five of the
# tasks, then the tables of docs/results.md: all tasks with their own adapter in the pool, and without it.
#   runs/real.sh MODEL TASKS [FOLDER]    SmolLM2-135M-Instruct's folder, the task folders; default: out/real
set -euo pipefail
cd "$(dirname "$0")/.."
out=${3:-out/real}
run=(--model "$1" --tasks "$2" --pool "$out" --dtype float32)
only=(--only tatoeba_de --only tatoeba_es --only tatoeba_it --only past_tense --only question_formation
    --only word_sorting --only last_letters --only arithmetic --only object_counting --only sentiment_multiemo_en
    --only sports_understanding --only common_gen)

python train.py adapters "${run[@]}" "${only[@]}" --steps 120 --batch_size 3 --lr 2e-3 --save_dtype bfloat16 --resume
[ -e "$out/retriever.safetensors" ] || python train.py retriever "${run[@]}" --share 0.4 --test
python train.py router "${run[@]}" --share 0.4 --steps 60 --batch_size 10 --retrieve 5 --drop 0.3 --r 16 --prior 0.1 \
    --divisor 1 --resume
gates=("${run[@]}" --steps 60 --batch_size 12 --save_dtype bfloat16 --resume)
for kind in soft smear; do
    python train.py gates "${gates[@]}" --kind $kind --clip 1
done
for k in 1 3; do
    python train.py gates "${gates[@]}" --kind moe --top_k $k
done
python train.py gates "${gates[@]}" --top_k 2
for setting in "" --ood; do
    python train.py lorahub "${run[@]}" "${only[@]}" $setting
    python eval.py "${run[@]}" --out "$out-eval-lorahub$setting" $setting --limit 15 --max_new_tokens 40 \
        --batch_size 15 --methods lorahub
    python eval.py "${run[@]}" --out "$out-eval$setting" $setting --limit 15 --max_new_tokens 40 --batch_size 15 \
        --methods oracle,selection,mixture,fusion,adaptersoup,logo,meteora_top2,soft,moe_top1,moe_top3,smear,\
arrow,uniform,base
    python eval.py "${run[@]}" --out "$out-eval-12$setting" $setting --limit 15 --max_new_tokens 40 --batch_size 15 \
        --retrieve 12 --methods ramole
done
unseen=("${run[@]}" --unseen --limit 15 --max_new_tokens 40 --batch_size 15)
python eval.py "${unseen[@]}" --out "$out-eval-unseen" --methods oracle,selection,mixture,fusion
python eval.py "${unseen[@]}" --out "$out-eval-12-unseen" --retrieve 12 --methods ramole
