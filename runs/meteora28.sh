#!/usr/bin/env bash
# MeteoRA's claims on a real Llama with 28 real tasks: adapters, gates over them and what the paper compares them with,
# on prompts of one task and of 3, 5 and 10. Goes on where it was. FOLDER/seconds has the time of each command.
#   runs/meteora28.sh MODEL TASKS [FOLDER [PART...]]    SmolLM2-135M-Instruct's folder, the task folders;
#                                                       default: out/meteora28, all parts
set -euo pipefail
model=$(realpath "$1")
folders=$(realpath "$2")
cd "$(dirname "$0")/.."
out=${3:-out/meteora28}
parts=("${@:4}")
[ ${#parts[@]} -gt 0 ] || parts=(tune seed0 rivals taught late mixed seed1)

# MeteoRA's tasks, with three translations in place of its news. The last 60 training examples of each are for
# validation: a second folder of the tasks has them as its test split.
names="abstract_narrative_understanding alpaca cnn_dailymail contextual_parametric_knowledge_conflicts cs_algorithms
    disfl_qa elementary_math_qa epistemic_reasoning formal_fallacies_syllogisms_negation goal_step_wikihow gsm8k
    language_identification linguistics_puzzles logical_deduction object_counting paragraph_segmentation
    play_dialog_same_or_different question_selection reasoning_about_colored_objects strategyqa tatoeba_de tatoeba_es
    tatoeba_it topical_chat tracking_shuffled_objects unit_conversion vitaminc_fact_verification winowhy"
for name in $names; do
    mkdir -p "$out"/{tasks,valid}/"$name"
    cp "$folders/$name"/{task.json,test.jsonl} "$out/tasks/$name"
    cp "$folders/$name/task.json" "$out/valid/$name"
    head -n -60 "$folders/$name/train.jsonl" >"$out/tasks/$name/train.jsonl"
    cp "$out/tasks/$name/train.jsonl" "$out/valid/$name"
    tail -n 60 "$folders/$name/train.jsonl" >"$out/valid/$name/test.jsonl"
done

timed() { # runs python, adds a line to FOLDER/seconds
    local start=$SECONDS
    python "$@"
    printf '%s\t%s\n' $((SECONDS - start)) "$*" >>"$out/seconds"
}
run=(--model "$model" --tasks "$out/tasks" --save_dtype bfloat16 --max_length 1024 --resume)
lr=2e-3       # of an adapter of one task; the part `tune` compares three
joint_lr=1e-3 # of one for all tasks, likewise
budget=(--steps 200 --batch_size 2) # 400 examples of each task; for a joint adapter as many in all
gates=(--steps 100 --batch_size 28)
singles=(--model "$model" --tasks "$out/tasks" --limit 60 --max_new_tokens 128 --batch_size 30)
composites=("${singles[@]}" --against oracle --composite 3,5,10 --composites 60 --composite_temperature 1,5,15,30)

score() { # FOLDER, options of eval.py; what is done is not done again
    [ -e "$1/results.json" ] || timed eval.py --out "$1" "${@:2}"
}
train_adapters() { # POOL, options
    timed train.py adapters "${run[@]}" "${budget[@]}" --lr $lr --pool "$@"
}
train_joint() { # NAME, POOL, options
    timed train.py adapters "${run[@]}" "${budget[@]}" --lr $joint_lr --joint "$1" --pool "${@:2}"
}
train_gates() { # POOL, options
    timed train.py gates "${run[@]}" "${gates[@]}" --top_k 1 --pool "$@"
    timed train.py gates "${run[@]}" "${gates[@]}" --top_k 2 --pool "$@"
}

tune() { # learning rates: of adapters on seven tasks, of a joint one on a quarter of the examples
    local lr joint_lr name few=()
    for name in goal_step_wikihow object_counting strategyqa tatoeba_de topical_chat unit_conversion winowhy; do
        few+=(--only $name)
    done
    local valid=(--tasks "$out/valid" --max_new_tokens 64)
    for lr in 1e-3 2e-3 4e-3; do
        train_adapters "$out/tune/$lr" "${few[@]}"
        score "$out/tune/$lr-eval" "${singles[@]}" "${few[@]}" "${valid[@]}" --pool "$out/tune/$lr" \
            --methods base,oracle
    done
    for joint_lr in 5e-4 1e-3 2e-3; do
        train_joint lora_b "$out/tune/1e-3" --name "lora_b_$joint_lr" --steps 100 --batch_size 1
    done
    score "$out/tune/joint-eval" "${singles[@]}" "${valid[@]}" --limit 20 --pool "$out/tune/1e-3" \
        --methods lora_b_5e-4,lora_b_1e-3,lora_b_2e-3
}

seed0() { # the claims: as good as the oracle on single tasks, ahead of LoRA-B on composites
    train_adapters "$out/seed0"
    train_gates "$out/seed0"
    train_joint lora_f "$out/seed0"
    train_joint lora_b "$out/seed0"
    score "$out/seed0-eval" "${composites[@]}" --pool "$out/seed0" \
        --methods base,oracle,meteora_top1,meteora_top2,lora_f,lora_b
}

rivals() { # on single tasks
    train_joint lora_b "$out/seed0" --name lora_b_224 --r 224 --alpha 448
    timed train.py lorahub --model "$model" --tasks "$out/tasks" --pool "$out/seed0" --max_length 1024
    score "$out/rivals-eval" "${singles[@]}" --pool "$out/seed0" --against oracle --methods oracle,lora_b_224,uniform,\
ties_ab,ties_ba,dare_ab,dare_ba,svd,lorahub,arrow,random_gate,random_gate_top1,random_adapters
}

# Three attempts at composites that no adapter has seen in training, then the same with composites for all.
taught() { # gates that have seen tasks change within a prompt
    mkdir -p "$out/taught"
    cp -r "$out"/seed0/{adapters,pool.json} "$out/taught"
    train_gates "$out/taught" --composite 0.67
    score "$out/taught-eval" "${composites[@]}" --pool "$out/taught" --methods oracle,meteora_top1,meteora_top2
}

late() { # these gates, over adapters that were trained to start at a random token of the prompt
    train_adapters "$out/late" --late_start 0.7
    train_gates "$out/late" --composite 0.67
    score "$out/late-eval" "${composites[@]}" --pool "$out/late" --methods oracle,meteora_top1,meteora_top2
}

mixed() { # adapters, gates and LoRA-B have all seen composites
    train_adapters "$out/mixed" --composite 0.67
    train_gates "$out/mixed" --composite 0.67
    train_joint lora_b "$out/mixed" --composite 0.67
    score "$out/mixed-eval" "${composites[@]}" --pool "$out/mixed" \
        --methods oracle,meteora_top1,meteora_top2,lora_b
}

seed1() { # the claims again
    train_adapters "$out/seed1" --seed 1
    train_gates "$out/seed1" --seed 1
    train_joint lora_b "$out/seed1" --seed 1
    score "$out/seed1-eval" "${composites[@]}" --pool "$out/seed1" \
        --methods oracle,meteora_top1,meteora_top2,lora_b
}

for part in "${parts[@]}"; do
    $part
done
