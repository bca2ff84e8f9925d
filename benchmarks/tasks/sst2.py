"""SST-2: is a sentence of a film review positive or negative."""

from __future__ import annotations

from typing import Final

from preceptor.benchmarks.tasks.published import Published, shots

TASK: Final = Published(
    name="sst-2",
    signature="sentence -> kind: Literal['negative', 'positive']",
    instructions="Decide whether the review is positive or negative.",
    metric="accuracy",
    licence="terms of the corpus; the 16-shot draws are MIT",
    citation="Socher et al., 2013; draws by Deng et al., 2022 (RLPrompt)",
    sizes=(32, 32, 200),
    rows=shots("sst-2", ("negative", "positive"), test=200),
)
