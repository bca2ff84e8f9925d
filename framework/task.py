"""What a method's `search` is handed: seed, train rows, scoring and proposing, all metered."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections import Counter as Tally
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Request, Response, request_from_openai_chat

from preceptor.copies import with_own_models
from preceptor.errors import LMFailed
from preceptor.lineage import Birth
from preceptor.lm.budget import Cost
from preceptor.lm.dispatch import may_pass, reason
from preceptor.lm.flow import let_through
from preceptor.lm.ledger import Call
from preceptor.lm.meter import Meter, MeteredEngine, batching_engine
from preceptor.lm.seam import predictors, said, sampled, whole
from preceptor.lm.soft import EmbeddingSpace, SoftTokens, takes_none, with_soft_tokens
from preceptor.program import apply
from preceptor.run import Run
from preceptor.scoring import likelihood
from preceptor.scoring.evaluate import TOLERATED, Counter, Evaluator, Job, Losses, blameless, charged, refuse_failures
from preceptor.scoring.metrics import Metric, mean
from preceptor.scoring.statistics import interval
from preceptor.scoring.trial import Candidate, Outcome, Step, Trial

_NOT_SENT: Final = CLIENT_KEYS | {"n", "rollout_id", "cache", "temperature", "top_p", "max_tokens", "seed"}

Report = Callable[[str, int, int], None]
"""Told what is going on, how many rows are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a proposer's texts are drawn; `stop` ends those of a model in this process, others are read to their end."""

    temperature: float
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One compile, as its method sees it.

    Attributes:
        student: The program whose instructions are to be improved.
        seed: Its instructions as the user wrote them; in a search that shows some, with demonstrations.
        train: Rows to read errors from and to race candidates on.
        order: Train rows that may be scored, in a stratified random order; every beginning is a fair sample.
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
        confirm_rows, confirms: Rows kept for the confirmation, and how many programs are asked them.
        demonstrated: Train rows that are shown, not scored; they stood before `order`.
        ranked: What the method would return now, best first (see `hold`); while empty, those that saw most rows.
        drawn: Prompt -> how often the proposer was asked it.
        born: Keys of the candidates whose origin is written down.
        answered: Proposals that came, each time some were asked for.
        losses: Train rows that failed so far, of all that the compile has; None judges each evaluation by itself.
        rates, rooms: Calls a row took, and what calls reserved beyond what they took, each time rows were scored.
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
    confirm_rows: int = 0
    confirms: int = 2
    demonstrated: Sequence[int] = ()
    scored: list[Trial] = field(default_factory=list[Trial])
    ranked: list[Trial] = field(default_factory=list[Trial])
    drawn: Tally[str] = field(default_factory=Tally[str])
    born: set[str] = field(default_factory=set[str])
    answered: list[int] = field(default_factory=list[int])
    rates: list[float] = field(default_factory=list[float])
    rooms: list[Cost] = field(default_factory=list[Cost])
    losses: Losses | None = None

    @property
    def signatures(self) -> Mapping[str, type[dspy.Signature]]:
        """Predictor name -> signature."""
        return {name: predictor.signature for name, predictor in predictors(self.student)}

    @property
    def calls_a_row(self) -> float:
        """Most calls a row took in one evaluation so far, on average; one a predictor at least."""
        return max([1.0, len(self.signatures), *self.rates])

    @property
    def _has_steps(self) -> bool:
        """True unless a single predictor's only output is the label: then the answer says all of it."""
        return [list(one.output_fields) for one in self.signatures.values()] != [[self.output]]

    def score(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[Trial]:
        """Score candidates on the same train rows, as `score_each`; one call per candidate, row and predictor."""
        return self.score_each([(candidate, rows) for candidate in candidates])

    def score_each(self, walks: Sequence[tuple[Candidate, Sequence[int]]]) -> list[Trial]:
        """Score every candidate on train rows of its own; costs one call per row and predictor.

        The outcomes hold what each predictor was given and answered, unless that is a single one's label. Rows that
        failed are wrong answers of a candidate that several, and more than one of its rows in twenty, failed with.

        Raises:
            BudgetExhausted: If the budget ends.
            LMFailed: If more than one train row in twenty failed so far, and more than one of these in twenty.
        """
        programs = [(apply(self.student, one), one.key == self.seed.key, rows) for one, rows in walks]
        jobs = [Job(program, self.train[row], is_seed) for program, is_seed, rows in programs for row in rows]
        lengths = sorted({len(rows) for _, rows in walks})
        what = f"scoring {len(walks)} candidates on {' to '.join(map(str, lengths[:1] + lengths[1:][-1:]))} rows"
        scorer = evaluator(self, len(jobs), what, has_steps=self._has_steps, losses=self.losses)
        return self._trials(walks, self._counted(scorer, jobs))

    def record(
        self, candidate: Candidate, rows: Sequence[int], outcomes: Sequence[Outcome], calls: int | None = None
    ) -> Trial:
        """Write down a trial whose rows something else has scored, such as an optimizer of DSPy's; no call.

        Args:
            candidate: What was scored.
            rows: Train rows.
            outcomes: One a row.
            calls: Of the run, by the time the last row was scored; by default, by now.
        """
        trial = Trial(candidate, tuple(rows), tuple(outcomes), self.metric.aggregate(outcomes))
        self.scored.append(trial)
        spent = self.meter.account.spent.calls if calls is None else calls
        self.run.write_trials([trial], self.metric.aggregate, spent, partial(interval, metric=self.metric))
        return trial

    def hold(self, trials: Sequence[Trial]) -> None:
        """Return these trials, best first, if the search has to stop now; the best is written down. No call."""
        if trials:
            self.ranked[:] = trials
            self.run.write_held(trials[0], self.meter.account.spent.calls)

    def likelihood(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[Trial]:
        """Score candidates by log P(label | instruction, input) per token of the label; at most 0.

        One call per candidate and row. A row with several accepted labels counts its first.

        Raises:
            ConfigError: If the program or the model can't be scored so; see `refuse_likelihood`.
        """
        [(name, predictor)] = predictors(self.student)
        lm = predictor.lm or self.lm
        calls = [
            Call(likelihood.request(lm, name, predictor, candidate, self.train[row]))
            for candidate in candidates
            for row in rows
        ]
        self.report(f"likelihood of {len(candidates)} candidates on {len(rows)} rows", 0, len(calls))
        outcomes = [likelihood.outcome(result) for result in self.meter.ask(lm, calls)]
        return self._trials([(candidate, rows) for candidate in candidates], outcomes)

    def refuse_likelihood(self) -> None:
        """Raise unless log-probabilities of given answers can be had.

        Raises:
            ConfigError: Saying what is needed.
        """
        likelihood.refuse(self.signatures, predictors(self.student)[0][1].lm or self.lm, self.train)

    def steps(self, rows: Sequence[int], candidate: Candidate | None = None) -> list[tuple[Outcome, tuple[Step, ...]]]:
        """Run a candidate, by default the seed, on train rows; return what each predictor was given and answered."""
        watched = candidate or self.seed
        program, is_seed = apply(self.student, watched), watched.key == self.seed.key
        what = f"watching {'the seed' if is_seed else 'a candidate'} on {len(rows)} rows"
        scorer = evaluator(self, len(rows), what, has_steps=True, losses=self.losses)
        outcomes = self._counted(scorer, [Job(program, self.train[row], is_seed) for row in rows])
        self.meter.accept_failures()
        return [(outcome, outcome.steps) for outcome in outcomes]

    def made(self, candidate: Candidate, parent: Candidate, predictor: str, how: str, because: str = "") -> None:
        """Write down where a candidate comes from: its parent, how it was made, and the text that led to it.

        The seed comes from nowhere, and of several origins the first counts.
        """
        if candidate.key not in {self.seed.key, *self.born}:
            self.born.add(candidate.key)
            self.run.write_lineage(Birth(candidate, parent, predictor, how, because))

    def propose(self, prompts: Sequence[str], sampling: Sampling, *, samples: int = 1) -> list[str]:
        """Ask the proposer each prompt `samples` times; return the texts, prompt by prompt.

        A prompt that was asked before, here or in an earlier call, gets other draws.

        Raises:
            LMFailed: If more than one request in twenty failed in a way that may pass, or the proposer never answered.
        """
        asked = [prompt for prompt in prompts for _ in range(samples)]
        return [text for text in self.draw(asked, sampling) if text is not None]

    def draw(self, prompts: Sequence[str], sampling: Sampling) -> list[str | None]:
        """Ask the proposer each prompt once; return one text each, None where the request failed.

        A prompt that was asked before, here or in an earlier call, gets another draw.

        Raises:
            LMFailed: If more than one request in twenty failed in a way that may pass, or the proposer never answered.
        """
        calls: list[Call] = []
        for prompt in prompts:
            calls.append(Call(self._proposal(prompt, sampling, self.drawn[prompt]), self.drawn[prompt]))
            self.drawn[prompt] += 1
        return self._texts(calls)

    def choose(self, asked: Sequence[tuple[str, Sequence[str]]], sampling: Sampling) -> list[str | None]:
        """Ask the proposer to pick one of some texts, prompt by prompt; return what it wrote, None where that failed.

        A model in this process can only write one of the texts: one is drawn by the odds it gives them, at the
        temperature. Another may write anything.

        Raises:
            LMFailed: If more than one request in twenty failed in a way that may pass, or the proposer never answered.
        """
        calls: list[Call] = []
        for prompt, options in asked:
            request = self._proposal(prompt, sampling, self.drawn[prompt])
            if getattr(self.proposer.engine, "supports_choices", False):
                config = dataclasses.replace(request.config, extensions={"choices": list(options)})
                request = dataclasses.replace(request, config=config)
            calls.append(Call(request, self.drawn[prompt]))
            self.drawn[prompt] += 1
        return [
            self._picked(result, sampling.temperature) if isinstance(result, Response) else None
            for result in self._answers(calls)
        ]

    def _picked(self, response: Response, temperature: float) -> str:
        """Return a response's text; where it holds the odds of several, one drawn by them."""
        top: Sequence[Any] = response.logprobs[0].top if response.logprobs else ()
        if len(top) < 2 or not temperature:
            return said(response.message)
        odds = [math.exp((choice.logprob - top[0].logprob) / temperature) for choice in top]  # the first: the likeliest
        return str(self.rng.choices([choice.token for choice in top], odds)[0])

    @property
    def embedding_space(self) -> EmbeddingSpace:
        """What soft tokens for the proposer have to look like.

        Raises:
            ConfigError: If it takes none.
        """
        space: EmbeddingSpace | None = getattr(self.proposer.engine, "embedding_space", None)
        if space is None:
            raise takes_none(self.proposer.model)
        return space

    def propose_from(self, prompts: Sequence[tuple[SoftTokens, str]], sampling: Sampling) -> list[str]:
        """Ask the proposer each prompt below its soft tokens; return the texts, "" where a call failed.

        A request's own seed is drawn from its soft tokens.

        Raises:
            LMFailed: If more than one request in twenty failed in a way that may pass, or the proposer never answered.
        """
        calls = [Call(with_soft_tokens(self._proposal(prompt, sampling, soft), soft)) for soft, prompt in prompts]
        return [text or "" for text in self._texts(calls)]

    def _texts(self, calls: Sequence[Call]) -> list[str | None]:
        texts = [whole(result) if isinstance(result, Response) else None for result in self._answers(calls)]
        if None in texts:
            self.report(f"{texts.count(None)} of {len(texts)} proposals failed or were cut: left out", 0, len(texts))
        return texts

    def _answers(self, calls: Sequence[Call]) -> list[Response | Exception]:
        """Ask the proposer; return answers and, for requests that it refuses for good, errors.

        Raises:
            LMFailed: If more than one in twenty failed as it may not the next time, or none was ever answered.
        """
        self.report(f"asking for {len(calls)} proposals", 0, len(calls))
        results = self.meter.ask(self.proposer, calls)
        failed = [result for result in results if isinstance(result, Exception)]
        self.answered.append(len(calls) - len(failed))
        is_down = sum(map(may_pass, failed)) > TOLERATED * len(calls)
        if is_down or (failed and not any(self.answered)):
            raise LMFailed(
                f"The proposer {self.proposer.model} failed {len(failed)} of {len(calls)} requests; "
                f"the first with: {reason(failed[0])}."
            )
        self.meter.accept_failures()
        return results

    def _proposal(self, prompt: str, sampling: Sampling, sample: int | SoftTokens) -> Request:
        settings = {name: value for name, value in self.proposer.kwargs.items() if name not in _NOT_SENT and value}
        engine, drawn = _engine(self.proposer), (sampling.temperature, sampling.top_p)
        own: dict[str, Any] = {**sampled(self.proposer.model, engine, *drawn), "max_tokens": sampling.max_tokens}
        if "max_completion_tokens" in settings:  # reasoning models take neither of the others
            own = {}
        takes = getattr(engine, "supported_params", ())
        if "stop" in takes and sampling.stop:
            own["stop"] = list(sampling.stop)
        if "seed" in takes:
            digest = hashlib.sha256(f"{self.rng_seed}\n{prompt}\n{sample}".encode()).digest()
            own["seed"] = int.from_bytes(digest[:4], "big")
        messages = [{"role": "user", "content": prompt}]
        return request_from_openai_chat({"model": self.proposer.model, "messages": messages, **settings, **own})

    @property
    def rng_seed(self) -> str:
        """Ties each proposal's draw to the order of the rows, which the compile's seed decides."""
        return ",".join(map(str, [*self.demonstrated, *self.order][:8]))

    def _counted(self, scorer: Evaluator, jobs: Sequence[Job]) -> list[Outcome]:
        """Run jobs, and keep back for the confirmation what rows have been seen to take."""
        account = self.meter.account
        before, unused = account.spent.calls, account.unused
        outcomes = scorer.run(jobs)
        calls = account.spent.calls - before
        self.rates.append(calls / max(1, len(jobs)))
        kept = math.ceil(self.confirms * self.confirm_rows * self.calls_a_row)
        self.rooms.append(self._room(account.unused - unused, calls, kept))
        most = Cost(0, max(room.tokens for room in self.rooms), max(room.dollars for room in self.rooms))
        account.hold(kept, most)
        return outcomes

    def _room(self, unused: Cost, calls: int, kept: int) -> Cost:
        """Return what as many calls as are let through together might take beyond what they do."""
        share = min(kept, let_through(self.lm)) / max(1, calls)
        return Cost(0, math.ceil(share * max(0, unused.tokens)), share * max(0.0, unused.dollars))

    def _trials(self, walks: Sequence[tuple[Candidate, Sequence[int]]], outcomes: list[Outcome]) -> list[Trial]:
        are_seeds = [candidate.key == self.seed.key for candidate, rows in walks for _ in rows]
        of = [id(self.train[row]) for _, rows in walks for row in rows]
        refuse_failures(blameless(outcomes, are_seeds), of=of, losses=self.losses)
        self.meter.accept_failures()
        worst = min([0.0, *(outcome.score or 0.0 for outcome in outcomes)])  # a likelihood is at most 0
        aggregate = self.metric.aggregate if worst >= 0 else mean
        trials: list[Trial] = []
        left = iter(outcomes)
        for candidate, rows in walks:
            own = charged(tuple(islice(left, len(rows))), worst)
            trials.append(Trial(candidate, tuple(rows), own, aggregate(own)))
        self.scored.extend(trials)
        spread = partial(interval, metric=self.metric) if worst >= 0 else None
        self.run.write_trials(trials, aggregate, self.meter.account.spent.calls, spread)
        return trials


def with_models(student: dspy.Module, meter: Meter) -> dspy.Module:
    """Return a copy whose predictors' own models, if they have any, are metered too; those of frozen parts as well."""
    return with_own_models(student, meter.wrap)


def evaluator(task: Task, rows: int, what: str, *, has_steps: bool = False, losses: Losses | None = None) -> Evaluator:
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
        losses=losses,
    )


def _engine(lm: dspy.LM) -> object:
    """Return the engine object behind a metered LM, or the name of the engine DSPy chose."""
    return _engine(lm.engine.lm) if isinstance(lm.engine, MeteredEngine) else lm.engine
