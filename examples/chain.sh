#!/usr/bin/env bash
# The whole chain of the synthetic world: render, pretrain, extract, train, evaluate.
# Called by `make world`, which sets WORK, VIDEOS, CLIPS, SEEDS and BIN.
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
runs=()
for seed in $SEEDS; do
  step "train cpl, seed $seed"
  # 128 channels and 12 epochs, where CPL has 256 and 30, so that the chain stays short.
  "$BIN/mmdist" train cpl --features "$features" --train "$world/world_sta_train.txt" \
    --val "$world/world_sta_val.txt" --out "$WORK/cpl-$seed" --seed "$seed" \
    --set hidden=128 --set feed_forward=256 --epochs 12
  runs+=("$WORK/cpl-$seed")
done
step "evaluate on the test split"
"$BIN/mmdist" evaluate "${runs[@]}" --features "$features" \
  --annotations "$world/world_sta_test.txt"
step "done"
