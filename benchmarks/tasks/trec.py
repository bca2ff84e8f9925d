"""TREC: what kind of answer a question asks for."""

from __future__ import annotations

from typing import Final

from preceptor.benchmarks.tasks.published import Hub, Published, Shots

HUB: Final = Hub("CogComp/trec", "65752bf53af25bc935a0dce92fb5b6c930728450")
"""Of its branch refs/convert/parquet: `datasets` no longer runs the script that the main branch holds."""

TASK: Final = Published(
    name="trec",
    signature="sentence -> kind: Literal['description', 'entity', 'abbreviation', 'human', 'location', 'number']",
    instructions="Classify the question by the type of its answer.",
    metric="accuracy",
    licence="terms of the corpus; the 16-shot draws are MIT",
    citation="Voorhees and Tice, 2000; draws by Deng et al., 2022 (RLPrompt)",
    sizes=(96, 96, 200),
    hub=HUB,
    rows=Shots(
        folder="trec",
        labels=("description", "entity", "abbreviation", "human", "location", "number"),
        hub=HUB,
        numbered=("abbreviation", "entity", "description", "human", "location", "number"),
        label="coarse_label",
    ),
)
