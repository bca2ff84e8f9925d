"""TREC: what kind of answer a question asks for."""

from __future__ import annotations

from typing import Final

from preceptor.benchmarks.tasks.published import Published, shots

TASK: Final = Published(
    name="trec",
    signature="sentence -> kind: Literal['description', 'entity', 'abbreviation', 'human', 'location', 'number']",
    instructions="Classify the question by the type of its answer.",
    metric="accuracy",
    licence="terms of the corpus; the 16-shot draws are MIT",
    citation="Voorhees and Tice, 2000; draws by Deng et al., 2022 (RLPrompt)",
    sizes=(96, 96, 200),
    rows=shots("trec", ("description", "entity", "abbreviation", "human", "location", "number"), test=200),
)
