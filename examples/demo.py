"""`make demo`: ground the example clip's first query and compare it with its annotation.

The clip is test video 0 of the synthetic world, whatever it shows; the model never saw it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import mmdist_e2e as mm

HERE = Path(__file__).parent
annotation = json.loads((HERE / "example.json").read_text())
query, (start, end) = annotation["query"], annotation["moment"]

begin = time.perf_counter()
grounder = mm.load(cache=HERE.parent / ".mmdist" / "features")
moments = grounder.ground(HERE / annotation["clip"], query)
seconds = time.perf_counter() - begin

print(f'"{query}" in {annotation["clip"]} ({annotation["duration_seconds"]:.1f} s):')
for rank, moment in enumerate(moments, start=1):
    print(f"  {rank}. {moment.start:6.2f} – {moment.end:6.2f} s   score {moment.score:.3f}")
best = moments[0]
overlap = max(0.0, min(end, best.end) - max(start, best.start))
union = max(end, best.end) - min(start, best.start)
print(f"annotated: {start:.2f} – {end:.2f} s; IoU of the first answer: {overlap / union:.2f}")
print(f"Answered by {grounder.model.card_line}, in {seconds:.1f} s.")
