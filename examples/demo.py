"""`make demo`: ground the example clip's first query and compare it with its annotation.

The clip is test video 0 of the synthetic world; the model was not trained on it.
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
answer = mm.load(cache=HERE.parent / ".mmdist" / "features").ground(
    HERE / annotation["clip"], query
)
seconds = time.perf_counter() - begin

print(answer)
best = answer[0]
overlap = max(0.0, min(end, best.end) - max(start, best.start))
union = max(end, best.end) - min(start, best.start)
print(f"Annotated: {start:.2f} to {end:.2f} s; IoU of the first moment: {overlap / union:.2f}")
print(f"Answered in {seconds:.1f} s.")
