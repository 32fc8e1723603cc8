#!/usr/bin/env bash
# The whole chain of the synthetic world: render, pretrain, extract, probe, reproduce the tables.
# Called by `make world`, which sets WORK, VIDEOS, RGB_CLIPS, FLOW_CLIPS, VALIDATION_CLIPS, TABLES,
# SEEDS, ABLATION_SEEDS, SET and BIN. Every step resumes a killed run.
set -euo pipefail
world="$WORK/videos"
features="$WORK/features"
step() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

step "render $VIDEOS videos"
"$BIN/python" -m world render --videos "$VIDEOS" --seed 0 --out "$world"
extractors=()
for modality in rgb flow; do
  step "pretrain the small $modality network"
  extractor="$WORK/$modality"
  effort=(--clips "$RGB_CLIPS" --cycles 2 --validation-clips "$VALIDATION_CLIPS")
  [ "$modality" = rgb ] || effort=(--clips "$FLOW_CLIPS" --validation-clips "$VALIDATION_CLIPS")
  if [ ! -f "$extractor/config.json" ]; then
    "$BIN/python" -m world pretrain --modality "$modality" --out "$extractor" \
      --cache "$WORK/clips" "${effort[@]}" --seed 0
  fi
  extractors+=(--extractor "$extractor")
done
step "extract features"
"$BIN/mmdist" extract "$world/videos" --modality rgb,flow "${extractors[@]}" --out "$features"
step "linear probe"
"$BIN/python" -m world probe --world "$world" "${extractors[@]}" \
  --features "$features" --json "$WORK/probe.json"
step "tables $TABLES"
"$BIN/mmdist" reproduce --tables "$TABLES" --features "$features" \
  --train "$world/world_sta_train.txt" --val "$world/world_sta_val.txt" \
  --annotations "$world/world_sta_test.txt" --preset small --length 40 \
  --seeds "$SEEDS" --ablation-seeds "$ABLATION_SEEDS" ${SET:+--set} ${SET// / --set } \
  --out "$WORK/rows"
step "done"
