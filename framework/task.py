"""What a method's `search` is handed: seed, train rows, scoring and proposing, all metered."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Request, Response, request_from_openai_chat

from preceptor.errors import ConfigError, LMFailed
from preceptor.lm.adapter import DirectAdapter, is_direct, output_name
from preceptor.lm.ledger import Call
from preceptor.lm.local import mean_log_probability
from preceptor.lm.meter import Meter, batching_engine
from preceptor.lm.seam import predictors
from preceptor.program import apply
from preceptor.run import Run
from preceptor.scoring.evaluate import Counter, Evaluator, Job, refuse_failures
from preceptor.scoring.metrics import Metric, mean, references
from preceptor.scoring.trial import Candidate, Outcome, Step, Trial

_NOT_SENT: Final = CLIENT_KEYS | {"n", "rollout_id", "cache", "temperature", "top_p", "max_tokens", "seed"}

Report = Callable[[str, int, int], None]
"""Told what is going on, how many rows are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a proposer's texts are drawn."""

    temperature: float
    top_p: float = 1.0
    max_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Task:
    """One compile, as its method sees it.

    Attributes:
        student: The program whose instructions are to be improved.
        seed: Its instructions as the user wrote them.
        train: Rows to read errors from and to race candidates on.
        order: A stratified random order of the train rows; every beginning is a fair sample.
        output: The field that holds the label, "" if there is none.
        metric: Scores outcomes.
        lm: The task's model, metered.
        proposer: Writes instructions, metered; may be the same.
        meter: Ledger and account.
        run: The run folder.
        rng: The method's own randomness.
        threads: Rows in flight where the model answers one request a call.
        report: Told of progress.
        scored: Every trial so far, in the order it was scored.
    """

    student: dspy.Module
    seed: Candidate
    train: Sequence[dspy.Example]
    order: Sequence[int]
    output: str
    metric: Metric
    lm: dspy.LM
    proposer: dspy.LM
    meter: Meter
    run: Run
    rng: random.Random
    threads: int
    report: Report
    scored: list[Trial] = field(default_factory=list[Trial])

    @property
    def signatures(self) -> Mapping[str, type[dspy.Signature]]:
        """Predictor name -> signature."""
        return {name: predictor.signature for name, predictor in predictors(self.student)}

    @property
    def scores_left(self) -> int | None:
        """How many rows can still be scored; None if the budget sets no bound on calls."""
        left = self.meter.account.calls_left
        return None if left is None else left // max(1, len(self.signatures))

    def score(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[Trial]:
        """Score candidates on the same train rows; costs one call per candidate, row and predictor.

        Raises:
            BudgetExhausted: If the budget ends.
            LMFailed: If more than one row in twenty failed.
        """
        programs = [apply(self.student, candidate) for candidate in candidates]
        jobs = [Job(program, self.train[row]) for program in programs for row in rows]
        what = f"scoring {len(candidates)} candidates on {len(rows)} rows"
        return self._trials(candidates, rows, self._evaluator(len(jobs), what).run(jobs))

    def likelihood(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[Trial]:
        """Score candidates by log P(label | instruction, input) per token of the label; at most 0.

        One call per candidate and row. A row with several accepted labels counts its first.

        Raises:
            ConfigError: If the program or the model can't be scored so; see `refuse_likelihood`.
        """
        [(name, predictor)] = predictors(self.student)
        calls = [
            Call(self._label_request(predictor, candidate, name, self.train[row]))
            for candidate in candidates
            for row in rows
        ]
        self.report(f"likelihood of {len(candidates)} candidates on {len(rows)} rows", 0, len(calls))
        results = self.meter.ask(self.lm, calls)
        return self._trials(candidates, rows, [_likelihood(result) for result in results])

    def refuse_likelihood(self) -> None:
        """Raise unless log-probabilities of given answers can be had.

        Raises:
            ConfigError: Saying what is needed.
        """
        signatures = list(self.signatures.values())
        if len(signatures) != 1 or not is_direct(signatures[0]):
            raise ConfigError("The likelihood score needs a program of one predictor with one plain output.")
        if not getattr(self.lm.engine, "supports_choices", False):
            raise ConfigError(f"The likelihood score needs a model in this process; {self.lm.model} only writes text.")

    def steps(self, rows: Sequence[int]) -> list[tuple[Outcome, tuple[Step, ...]]]:
        """Run the seed on train rows and return what each predictor was given and answered."""
        program = apply(self.student, self.seed)
        evaluator = self._evaluator(len(rows), f"watching the seed on {len(rows)} rows", has_steps=True)
        outcomes = evaluator.run([Job(program, self.train[row]) for row in rows])
        refuse_failures(outcomes, resume=f"preceptor resume {self.run.folder}")
        return [(outcome, outcome.steps) for outcome in outcomes]

    def propose(self, prompts: Sequence[str], sampling: Sampling, *, samples: int = 1) -> list[str]:
        """Ask the proposer each prompt `samples` times; return the texts, prompt by prompt.

        Raises:
            LMFailed: If no prompt was answered.
        """
        calls = [Call(self._proposal(prompt, sampling, n), n) for prompt in prompts for n in range(samples)]
        self.report(f"asking for {len(calls)} proposals", 0, len(calls))
        results = self.meter.ask(self.proposer, calls)
        texts = [result.message.text or "" for result in results if isinstance(result, Response)]
        if calls and not texts:
            raise LMFailed(f"The proposer {self.proposer.model} answered none of {len(calls)} requests: {results[0]}")
        return texts

    def _proposal(self, prompt: str, sampling: Sampling, sample: int) -> Request:
        settings = {name: value for name, value in self.proposer.kwargs.items() if name not in _NOT_SENT and value}
        own = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
        if "max_completion_tokens" in settings:  # reasoning models take neither of the others
            own = {}
        if batching_engine(self.proposer) is not None:
            digest = hashlib.sha256(f"{self.rng_seed}\n{prompt}\n{sample}".encode()).digest()
            own["seed"] = int.from_bytes(digest[:4], "big")
        messages = [{"role": "user", "content": prompt}]
        return request_from_openai_chat({"model": self.proposer.model, "messages": messages, **settings, **own})

    @property
    def rng_seed(self) -> str:
        """Ties each proposal's draw to the order of the rows, which the compile's seed decides."""
        return ",".join(map(str, self.order[:8]))

    def _evaluator(self, rows: int, what: str, *, has_steps: bool = False) -> Evaluator:
        return evaluator(self, rows, what, has_steps=has_steps)

    def _label_request(self, predictor: Any, candidate: Candidate, name: str, example: dspy.Example) -> Request:
        signature = predictor.signature.with_instructions(candidate.instructions[name])
        demos = [dict(demo) for demo in candidate.demos.get(name, predictor.demos)]
        label = references(example[output_name(signature)])[0]
        return DirectAdapter().request(self.lm, {}, signature, demos, example.inputs().toDict(), [label])

    def _trials(self, candidates: Sequence[Candidate], rows: Sequence[int], outcomes: list[Outcome]) -> list[Trial]:
        refuse_failures(outcomes, resume=f"preceptor resume {self.run.folder}")
        trials: list[Trial] = []
        for at, candidate in enumerate(candidates):
            own = tuple(outcomes[at * len(rows) : (at + 1) * len(rows)])
            aggregate = mean if any((outcome.score or 0) < 0 for outcome in own) else self.metric.aggregate
            trials.append(Trial(candidate, tuple(rows), own, aggregate(own)))
        self.scored.extend(trials)
        self.run.write_trials(trials)
        return trials


def evaluator(task: Task, rows: int, what: str, *, has_steps: bool = False) -> Evaluator:
    """Return an evaluator that reports its progress as `what`, of so many rows."""
    task.report(what, 0, rows)
    return Evaluator(
        task.lm,
        task.metric,
        task.output,
        together=batching_engine(task.lm) is not None,
        threads=task.threads,
        has_steps=has_steps,
        on_row=Counter(lambda done: task.report(what, done, rows)),
    )


def _likelihood(result: Response | Exception) -> Outcome:
    if isinstance(result, Exception):
        return Outcome("failed", None, error=str(result))
    return Outcome("scored", mean_log_probability(result))
