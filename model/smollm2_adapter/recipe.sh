#!/bin/sh
# How this adapter was made, with nothing but the model itself. The two trainings end within 102 minutes; the model's own
# writing takes as long as the machine needs.
set -e
out=${1:-runs/smollm2-adapter}
here=$(dirname "$0")
form="--model smollm2 --exit-layer 3 --intermediate-size 1536 --draft-vocabulary 8192"
mkdir -p "$out"
kangaroo generate-data --model smollm2 --out "$out/questions.jsonl" --texts 2733
kangaroo generate-data --model smollm2 --out "$out/tasks.jsonl" --texts 1305 --system-prompts "$here/system_prompts.txt" \
  --max-prompt-tokens 320 --seed 1
kangaroo train $form --data "$out/questions.jsonl" --out "$out/first" --minutes 60
kangaroo train $form --data "$out/questions.jsonl" --data "$out/tasks.jsonl" --out "$out/second" --minutes 42 \
  --start-from "$out/first" --sequence-length 512 --batch-size 8 --learning-rate 0.01 --total-variation 0.9
