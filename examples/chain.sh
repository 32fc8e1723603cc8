#!/usr/bin/env bash
# The whole chain of the synthetic world: render, pretrain, extract, train, evaluate.
# Called by `make world`, which sets WORK, VIDEOS, CLIPS, RECIPES, SEEDS and BIN.
# Every step goes on where a killed run left it.
set -euo pipefail
world="$WORK/videos"
features="$WORK/features"
step() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

step "render $VIDEOS videos"
"$BIN/mmdist" synth --videos "$VIDEOS" --seed 0 --out "$world"
extractors=()
for modality in rgb flow; do
  step "pretrain the small $modality network"
  extractor="$WORK/world1-$modality"
  if [ ! -f "$extractor/config.json" ]; then
    "$BIN/python" -m mmdist_e2e.synthetic.pretrain --modality "$modality" --out "$extractor" \
      --cache "$WORK/clips" --clips "$CLIPS" --seed 0
  fi
  extractors+=(--extractor "$extractor")
done
step "extract features"
"$BIN/mmdist" extract "$world/videos" --modality rgb,flow "${extractors[@]}" --out "$features"
step "linear probe"
"$BIN/python" -m mmdist_e2e.synthetic.probe --world "$world" "${extractors[@]}" \
  --features "$features" --json "$WORK/probe.json"
for recipe in $RECIPES; do
  runs=()
  for seed in $SEEDS; do
    step "train $recipe, seed $seed"
    "$BIN/mmdist" train "$recipe" --features "$features" --train "$world/world_sta_train.txt" \
      --val "$world/world_sta_val.txt" --out "$WORK/$recipe-$seed" --seed "$seed"
    runs+=("$WORK/$recipe-$seed")
  done
  step "evaluate $recipe on the test split"
  "$BIN/mmdist" evaluate "${runs[@]}" --features "$features" \
    --annotations "$world/world_sta_test.txt"
done
step "done"
