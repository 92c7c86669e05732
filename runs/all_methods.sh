#!/usr/bin/env bash
# All methods on one base, one pool, the same examples and tests: trains over a copy of tiny/ what it lacks, then prints
# one table. Goes on where it was. Nothing else should run beside bench.py, which times the methods.
#   runs/all_methods.sh [FOLDER]    a folder that runs/cpu.sh made; default: tiny
set -euo pipefail
cd "$(dirname "$0")/.."
tiny=${1:-tiny}
out=out/all_methods
tasks=out/tiny_tasks
[ -e $tasks ] || python -m tasks.tiny --out $tasks
[ -e $out/pool ] || { mkdir -p $out && cp -r "$tiny" $out/pool; }

# Each sees 300 steps of 84 examples, two of three in composites, where it can. SMEAR and SAMoRA take one task a prompt.
run=(--model "$tiny" --tasks $tasks --steps 300 --batch_size 84 --max_length 1024 --resume)
gates=("${run[@]}" --pool $out/pool --save_dtype bfloat16)
muon=(--composite 0.67 --optimizer muon --lr 0.1 --clip 0)
python train.py gates "${gates[@]}" "${muon[@]}" --kind meteora_once --top_k 1 --beta 1
python train.py gates "${gates[@]}" "${muon[@]}" --kind meteora_once --top_k 2 --beta 2
python train.py gates "${gates[@]}" "${muon[@]}" --kind ase --top_k 2 --beta 2
python train.py gates "${gates[@]}" "${muon[@]}" --kind ase --top_k 3 --beta 2
for kind in soft loraflow; do
    python train.py gates "${gates[@]}" --composite 0.67 --clip 1 --kind $kind
done
for k in 1 3; do
    python train.py gates "${gates[@]}" --composite 0.67 --clip 1 --kind moe --top_k $k
done
python train.py gates "${gates[@]}" --clip 1 --kind smear
python train.py samora "${run[@]}" --pool $out/pool --save_dtype bfloat16 --lr 5e-3
python train.py drlora "${run[@]}" --pool $out/drlora --save_dtype bfloat16 --lr 5e-3

known=base,uniform,arrow,spectr,spectr_weighted,lag,lag_weighted,meteora_top1,meteora_top2,meteora_once_top1,\
meteora_once_top2,ase_top2,ase_top3,soft,loraflow,smear,moe_top1,moe_top3,selection,mixture,fusion,ramole,logo_top1,\
logo,logo_norm_last_top20,random_gate,random_gate:1,random_gate:2,random_gate_top1,random_adapters
every=oracle,lora_f,lora_b,samora,$known
on=(--model "$tiny" --pool $out/pool)
python eval.py "${on[@]}" --out $out/with --methods $every --composite 3,5,10
python eval.py "${on[@]}" --out $out/with-28 --methods ramole --retrieve 28 --composite 3,5,10
python eval.py --model "$tiny" --pool $out/drlora --out $out/with-drlora --methods drlora --composite 3,5,10
python eval.py "${on[@]}" --out $out/without --methods $known --ood
python eval.py "${on[@]}" --out $out/without-28 --methods ramole --retrieve 28 --ood
python eval.py --model "$tiny" --pool $out/drlora --out $out/without-drlora --methods drlora --ood
python bench.py methods "${on[@]}" --tasks $tasks --methods $every >$out-speed.txt
python bench.py methods --model "$tiny" --pool $out/drlora --tasks $tasks --methods base,drlora >$out-speed-drlora.txt
python docs/all_methods.py $out
