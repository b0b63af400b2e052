#!/bin/sh
# How this adapter was made, with nothing but the model itself: sh recipe.sh [FOLDER [SHARE]]
# The three trainings end within 170 minutes; the model's own writing takes as long as the machine needs.
# With a SHARE of 20, a twentieth of the texts and minutes tries all steps in half an hour or less.
set -e
out=${1:-runs/smollm2-adapter}
share=${2:-1}
here=$(dirname "$0")
form="--model smollm2 --exit-layer 3 --intermediate-size 1536 --draft-vocabulary 8192"
mkdir -p "$out"
kangaroo generate-data --model smollm2 --out "$out/questions.jsonl" --texts $((2733 / share))
kangaroo generate-data --model smollm2 --out "$out/tasks.jsonl" --texts $((1305 / share)) --max-prompt-tokens 320 \
  --system-prompts "$here/system_prompts.txt" --seed 1
kangaroo train $form --data "$out/questions.jsonl" --out "$out/first" --minutes $((60 / share))
kangaroo train $form --data "$out/questions.jsonl" --data "$out/tasks.jsonl" --out "$out/second" \
  --minutes $((42 / share)) --start-from "$out/first" --sequence-length 512 --batch-size 8 --learning-rate 0.01 \
  --total-variation 0.9
python "$here/tasks_about_texts.py" "$out/prompts.jsonl" "$out/questions.jsonl" "$out/tasks.jsonl"
kangaroo generate-data --model smollm2 --out "$out/about.jsonl" --texts $((900 / share)) --prompts "$out/prompts.jsonl" \
  --max-new-tokens 160 --seed 3
kangaroo train $form --data "$out/questions.jsonl" --data "$out/tasks.jsonl" --data "$out/about.jsonl" \
  --out "$out/third" --minutes $((68 / share)) --start-from "$out/second" --sequence-length 768 --batch-size 6 \
  --learning-rate 0.01 --total-variation 0.9
