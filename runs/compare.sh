#!/usr/bin/env bash
# Everything that MeteoRA stands beside, on tiny/: trains what it lacks, then prints the tables of docs/results.md. Goes
# on where it was.
#   runs/compare.sh [FOLDER]    a folder that runs/cpu.sh made; default: out/tiny
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/tiny}
tasks=out/tiny_tasks

python -m tasks.tiny --out $tasks
run=(--model "$out" --tasks $tasks --save_dtype bfloat16 --max_length 1024 --resume)
for joint in lora_f lora_b; do # as many parameters as the 28 adapters
    python train.py adapters "${run[@]}" --pool "$out" --joint $joint --name ${joint}_224 --r 224 --alpha 448 \
        --steps 388 --lr 1e-3 --composite 0.32
done
for kind in soft loraflow; do
    python train.py gates "${run[@]}" --pool "$out" --kind $kind --batch_size 84 --composite 0.67 --steps 300 --clip 1
done
python train.py gates "${run[@]}" --pool "$out" --kind smear --batch_size 84 --steps 300 --clip 1
python train.py lorahub --model "$out" --pool "$out" --tasks $tasks --max_length 1024
python eval.py --model "$out" --out "$out-compare" --composite 3,5,10 --methods \
base,oracle,meteora_top1,meteora_top2,lora_f,lora_b,lora_f_224,lora_b_224,soft,loraflow,smear,arrow,lorahub,uniform,\
average_ab,svd,ties_ab,ties_ba,dare_ab,dare_ba

# The same without composites: adapters that each saw their task alone, gates alone, LoRA-B from the same examples.
alone="$out-alone"
gates=(--batch_size 28 --optimizer muon --lr 0.3 --clip 0)
python train.py gates "${run[@]}" "${gates[@]}" --pool "$alone" --top_k 1 --steps 1500
python train.py gates "${run[@]}" "${gates[@]}" --pool "$alone" --top_k 2 --steps 1000 --beta 2
python train.py adapters "${run[@]}" --pool "$alone" --joint lora_b --steps 200 --lr 2e-3
python train.py adapters "${run[@]}" --pool "$alone" --joint lora_b --name lora_b_224 --r 224 --alpha 448 \
    --steps 200 --lr 1e-3
python eval.py --model "$out" --pool "$alone" --out "$alone-eval" --composite 3,5,10 --composite_temperature 1,5,15 \
    --methods base,oracle,lora_b,lora_b_224,meteora_top1,meteora_top2
# Gates fitted to features, without a backward pass.
for fit in own routed; do
    mkdir -p "$out-$fit"
    cp -r "$alone"/{adapters,pool.json} "$out-$fit"
    python train.py gates "${run[@]}" --pool "$out-$fit" --top_k 1 --fit $fit --steps 200 --batch_size 28 # 5,600 examples
    python eval.py --model "$out" --pool "$out-$fit" --out "$out-$fit-eval" --methods oracle,meteora_top1
done
