"""A third party's method: change the best instruction a little, keep the change if it scores higher, go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from preceptor.scoring.trial import Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter


@dataclass(frozen=True, kw_only=True)
class HillClimbing(Teleprompter):
    """Asks for `steps` changes, one after the other and predictor by predictor; scores each on all train rows."""

    formula: ClassVar[str] = "rows + steps * (1 + rows)"

    steps: int = 10

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        score = rows * len(signatures)
        steps = self.steps if calls is None else max(1, min(self.steps, (calls - score) // (1 + score)))
        return Estimate(least=score + 1 + score, expected=score + steps * (1 + score))

    def search(self, task: Task) -> Sequence[Trial]:
        names = list(task.signatures)
        [best] = task.score([task.seed], task.order)
        for step in range(self.steps):
            left = task.meter.account.calls_left
            if left is not None and left < 1 + len(task.order) * len(names):
                break
            name = names[step % len(names)]
            for text in task.propose([_question(task, best, name, step)], Sampling(1.0)):
                [trial] = task.score([best.candidate.with_instruction(name, text)], task.order)
                best = max(best, trial, key=lambda one: one.score)
        return [best]


def _question(task: Task, best: Trial, name: str, step: int) -> str:
    wrong = [row for row, outcome in zip(best.rows, best.outcomes, strict=True) if outcome.score == 0]
    shown = "\n".join(str(task.train[row].inputs().toDict()) for row in wrong[:3])
    return f"Try {step}: change this instruction a little.\n{best.candidate.instructions[name]}\nIt fails on:\n{shown}"
