"""ProTeGi: a model criticises a prompt by its errors and edits it against the criticism; a beam keeps the best.

Paper:   Pryzant et al., "Automatic Prompt Optimization with 'Gradient Descent' and Beam Search", EMNLP 2023.
         arXiv:2305.03495
Notes:   seeds/protegi.md
Departs: a predictor's whole instruction is edited, several predictors one after the other, each with its own inputs,
         outputs and errors; a criticism is one sentence, and an edit at most twice as long as its prompt or 60 words;
         a prompt without errors in the minibatch is left alone; the search stops when rounds
         don't help on train rows set aside, and these pick the winner, which is confirmed on rows no search step
         has seen; the two paraphrases of a text are asked for in one request; proposals that copy training text
         are left out, as are those that were tried before; minibatches and the rows that candidates walk are
         stretches of one stratified order, from a random start, so that labels are spread;
         confidence bounds are decided for 32 rows at once; tasks run at the model's own temperature.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, ClassVar, Final, Literal

from preceptor.errors import ConfigError
from preceptor.leaks import Guard, count_words
from preceptor.scoring import bandits
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter, check_least, check_sampling
from preceptor.teleprompters.reading import END, errors, parse

logger = logging.getLogger(__name__)

GRADIENT: Final = Template("""\
A language model is given these instructions:

$prompt

With them, it got these examples wrong:

$errors

Explain in one sentence, in general terms, what the instructions fail to say. \
Write the sentence between <START> and <END>.""")
"""Ours, with what the paper shows and its tags: the gradient."""

EDIT: Final = Template("""\
A language model is given these instructions:

$prompt

With them, it got these examples wrong:

$errors

The reason is this: $reason

Write better instructions, which mend this, in at most $words words. They must hold for every input, and copy no \
example. Write $count, between <START> and <END> each.""")
"""Ours, with what the paper shows and its tags: the step against the gradient."""

PARAPHRASE: Final = Template("""\
Say these instructions in other words, with the same meaning:

$prompt

Write $count, between <START> and <END> each.""")
"""Ours, with the paper's request to keep the meaning: the local Monte-Carlo search."""

WORDS: Final = 60
"""Most of an edit, if that is twice as many as the prompt has; else twice the prompt's."""

HELD_OUT: Final = 50
"""Most train rows set aside to tell when rounds stop helping: the paper's development set."""

LEAST_HELD_OUT: Final = 8
"""With fewer, nothing is set aside."""

DEPTH: Final = 3
"""Rounds a small budget is planned for if it can pay for them: in the paper, learning curves peak there."""


@dataclass(frozen=True, slots=True)
class Round:
    """The settings of one round; the names are those of `ProTeGi`."""

    parents: int
    minibatch: int
    gradients: int
    edits: int
    paraphrases: int
    successors: int
    evaluations: int

    def cost(self, parents: int, held_out: int, calls_a_row: float) -> int:
        """Return the calls of a round with so many prompts to expand, at most `self.parents` of them.

        Example:
            >>> paper = Round(4, 64, 4, 1, 2, 8, 50)
            >>> paper.cost(1, 0, 1) - 9 * 50, paper.cost(4, 0, 1) - 36 * 50
            (77, 308)
        """
        parents = min(parents, self.parents)
        edits = self.gradients * self.edits
        proposals = parents * (2 * self.gradients + (edits + 1 if self.paraphrases else 0))
        rows = parents * (self.minibatch + (1 + self.successors) * self.evaluations) + held_out
        return proposals + math.ceil(rows * calls_a_row)


def _tokens(words: int, prompt: str) -> int:
    """Return the tokens that are let through for so many words in the prompt's language.

    Two a word. In other scripts than Latin's a word takes more, and where there are no spaces, as in Thai, no word can
    be told from the next: there twice the prompt's characters are let through, if that is more than four a word.
    """
    foreign = sum(letter.isalpha() and not letter.isascii() for letter in prompt)
    return 2 * words if 2 * foreign < len(prompt) else max(4 * words, 2 * len(prompt))


@dataclass(frozen=True, kw_only=True)
class ProTeGi(Teleprompter):
    """Prompt optimization with textual gradients; also called APO.

    Each round runs the prompts of the beam on a minibatch, asks `proposer` what is wrong with each by groups of
    its errors, has it edited against every criticism, paraphrases the edits and the prompt, and keeps
    the best of all with a bandit. A prompt costs 64 task calls and 13 proposer calls a round; then every
    candidate, 9 in the first round and 36 later, costs `evaluations` task calls on average. At most 50 train
    rows, a third of them, are set aside (none of fewer than 24) and score the winner of each round.

    Without a budget of calls these are the paper's settings, but no more rows than there are. With one, each round
    takes the first of these that the rest can pay for: 3 rounds of one of the first four if possible, else 2 of
    one of them, else 1 round of any: the settings; at most 25 evaluations; 1 parent too; 12 evaluations and a
    minibatch of 32; 2 gradients of 1 edit, 1 paraphrase and 4 successors; a minibatch of 16, 1 gradient and 1
    successor.

    Args:
        rounds: Of expansion and selection (6 in the paper).
        beam: Prompts kept after a round (4 in the paper).
        minibatch: Train rows on which errors are read, the same for all prompts of a round (64 in the paper).
        errors: Errors in one group (4 in the paper).
        gradients: Groups of errors drawn from a prompt's, one criticism each (4 in the published code).
        edits: Rewritten prompts per criticism (1 in the paper).
        paraphrases: Of each edit and of the prompt itself, asked for in one request (2 in the paper).
        successors: New prompts per parent that are scored, drawn at random from all (8 in the paper).
        select: How the best are found; see `preceptor.scoring.bandits` (`ucb` in the paper).
        c: Weight of the bonus of `ucb` and `ucb-e` (2.0 in the paper).
        evaluations: Train rows per candidate, on average, that the bandit may spend (12 to 50 in the paper).
        stale_rounds: Rounds without a better score on the rows set aside after which the search ends; 0 sets no
            rows aside and makes every round, as the paper does.
        temperature: Of the proposer (1.0 in the paper).
        max_tokens: Of a proposal (1,024 in the published code), and no more than two for each word that edits may have
            (four in other scripts than Latin's, or two for each of the prompt's characters).

    Raises:
        ConfigError: If a number is out of range, or there is no such selection.
    """

    paper: ClassVar[str] = "arXiv:2305.03495"
    formula: ClassVar[str] = "rounds * (beam * (minibatch + 13) + evaluations * beam * 9)"

    rounds: int = 6
    beam: int = 4
    minibatch: int = 64
    errors: int = 4
    gradients: int = 4
    edits: int = 1
    paraphrases: int = 2
    successors: int = 8
    select: Literal["ucb", "ucb-e", "successive-rejects", "successive-halving", "uniform"] = "ucb"
    c: float = 2.0
    evaluations: int = 50
    stale_rounds: int = 2
    temperature: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        least = dict.fromkeys(("rounds", "beam", "minibatch", "errors", "gradients", "edits", "successors"), 1)
        check_least(self, {**least, "evaluations": 1, "max_tokens": 1, "paraphrases": 0, "stale_rounds": 0})
        check_sampling(self)
        if not (0 <= self.c < math.inf):
            raise ConfigError(f"ProTeGi needs c >= 0, got {self.c}.")
        if self.select not in bandits.RULES:
            raise ConfigError(f"ProTeGi selects by {', '.join(bandits.RULES)}, not by {self.select!r}.")

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls of all predictors' searches if no round is the last before its time."""
        predictors, held_out = len(signatures), self._held_out(rows)
        rows -= held_out
        seed = held_out * predictors
        least = seed + self._plans(rows)[-1].cost(1, held_out, predictors)
        left = None if calls is None else max(calls // predictors, least) - seed
        expected, width = seed, 1
        for number in range(self.rounds):
            plan = self._affordable(rows, held_out, width, self.rounds - number, left, predictors)
            if plan is None:
                break
            cost = plan.cost(width, held_out, predictors)
            expected, left = expected + cost, None if left is None else left - cost
            width = min(self.beam, min(width, plan.parents) * (1 + plan.successors))
        return Estimate(least=least * predictors, expected=expected * predictors)

    def search(self, task: Task) -> Sequence[Trial]:
        """Improve the predictors' instructions one after the other; return the trials, best first."""
        trials: Sequence[Trial] = []
        best, names = task.seed, list(task.signatures)
        for at, name in enumerate(names):
            left = task.meter.account.calls_left
            others = 0 if left is None else left - left // (len(names) - at)
            trials = self._improve(task, name, best, others) or trials
            best = trials[0].candidate if trials else best
        return trials

    def _improve(self, task: Task, name: str, seed: Candidate, others: int) -> list[Trial]:
        """Expand and select (Algorithm 1), leaving so many calls to the other predictors; return trials, best first."""
        count = self._held_out(len(task.order))
        held_out, rows = task.order[:count], task.order[count:]
        winners = task.score([seed], held_out) if held_out else []
        task.hold(winners)
        beam, ranked, made, stale = [seed], list[Trial](), {seed.key}, 0
        for number in range(self.rounds):
            left = None if task.meter.account.calls_left is None else task.meter.account.calls_left - others
            plan = self._affordable(len(rows), count, len(beam), self.rounds - number, left, task.calls_a_row)
            if plan is None or (held_out and self.stale_rounds == stale > 0):
                break
            parents = beam[: plan.parents]
            fresh = self._expanded(task, name, parents, _stretch(task, rows, plan.minibatch), plan, made)
            if fresh:
                ranked = self._selected(task, [*parents, *fresh], _stretch(task, rows, len(rows)), plan.evaluations)
                beam = [trial.candidate for trial in ranked[: self.beam]]
            known = max((trial.score for trial in winners), default=0.0)
            is_new = all(trial.candidate.key != beam[0].key for trial in winners)
            winners += task.score(beam[:1], held_out) if held_out and is_new else []
            task.hold(_best_first(winners) or ranked)
            stale = 0 if winners and winners[-1].score > known else stale + 1
            logger.info("Round %d: %d new candidates, %d rounds without a gain", number + 1, len(fresh), stale)
        return _best_first(winners) or ranked

    def _expanded(
        self, task: Task, name: str, parents: list[Candidate], minibatch: list[int], plan: Round, made: set[str]
    ) -> list[Candidate]:
        """Return the parents' new successors (Algorithm 2): errors, gradients, edits, paraphrases, a random few."""
        groups = [
            (parent, "\n\n".join(task.rng.sample(wrong, min(self.errors, len(wrong)))))
            for parent in parents
            if (wrong := errors(task, name, parent, minibatch))
            for _ in range(plan.gradients)
        ]
        criticisms = self._ask(
            task, GRADIENT, [{"prompt": parent.instructions[name], "errors": shown} for parent, shown in groups], 1
        )
        slopes = [(*group, said[0]) for group, said in zip(groups, criticisms, strict=True) if said]
        edits = self._ask(
            task,
            EDIT,
            [
                {"prompt": parent.instructions[name], "errors": shown, "reason": reason}
                for parent, shown, reason in slopes
            ],
            plan.edits,
        )
        successors = _Successors(task, name, made)
        for (parent, _, reason), texts in zip(slopes, edits, strict=True):
            successors.add(parent, parent, "gradient", texts, reason)
        sources = successors.sources([parent for parent, _ in groups]) if plan.paraphrases else []
        asked = [{"prompt": source.instructions[name]} for _, source in sources]
        variations = self._ask(task, PARAPHRASE, asked, plan.paraphrases)
        for (parent, source), texts in zip(sources, variations, strict=True):
            successors.add(parent, source, "paraphrase", texts)
        return successors.drawn(plan.successors)

    def _ask(self, task: Task, template: Template, filled: Sequence[Mapping[str, str]], count: int) -> list[list[str]]:
        """Return the texts that the proposer wrote between tags for each filled template, which asks for so many."""
        words = [max(WORDS, 2 * count_words(fields["prompt"])) for fields in filled]
        room = max([0, *(_tokens(bound, fields["prompt"]) for bound, fields in zip(words, filled, strict=True))])
        cut = min(self.max_tokens, room * (count if template is EDIT else max(1, count // 2)))
        sampling = Sampling(self.temperature, max_tokens=cut, stop=END if count == 1 else ())
        asked = [
            template.substitute(fields, words=bound, count=_versions(count))
            for bound, fields in zip(words, filled, strict=True)
        ]
        texts = task.draw(asked, sampling)
        return [parse(text or "")[:count] for text in texts]

    def _selected(self, task: Task, candidates: list[Candidate], order: list[int], evaluations: int) -> list[Trial]:
        """Spend so many rows per candidate, on average, on finding the best; return all trials, best first."""
        outcomes: list[tuple[Outcome, ...]] = [()] * len(candidates)

        def pull(counts: Mapping[int, int]) -> Mapping[int, float]:
            walks = [
                (candidates[arm], order[len(outcomes[arm]) : len(outcomes[arm]) + count])
                for arm, count in counts.items()
            ]
            for arm, trial in zip(counts, task.score_each(walks), strict=True):
                outcomes[arm] += trial.outcomes
            return {arm: task.metric.aggregate(outcomes[arm]) for arm in counts}

        select = bandits.rule(self.select, self.c)
        found = select(len(candidates), pull, len(order), evaluations * len(candidates))
        return [
            Trial(candidates[arm], tuple(order[: found.pulls[arm]]), outcomes[arm], found.means[arm])
            for arm in found.ranking
        ]

    def _plans(self, rows: int) -> list[Round]:
        """Return the settings of a round on so many rows, the dearest first."""
        edits = self.gradients * self.edits
        full = Round(
            parents=self.beam,
            minibatch=min(self.minibatch, rows),
            gradients=self.gradients,
            edits=self.edits,
            paraphrases=self.paraphrases,
            successors=min(self.successors, edits + (edits + 1) * self.paraphrases),
            evaluations=min(self.evaluations, rows),
        )
        fewer = dataclasses.replace(full, evaluations=min(25, full.evaluations))
        greedy = dataclasses.replace(fewer, parents=1)
        short = dataclasses.replace(
            greedy, minibatch=min(32, greedy.minibatch), evaluations=min(12, greedy.evaluations)
        )
        few = dataclasses.replace(
            short,
            gradients=min(2, short.gradients),
            edits=1,
            paraphrases=min(1, short.paraphrases),
            successors=min(4, short.successors),
        )
        one = dataclasses.replace(few, minibatch=min(16, few.minibatch), gradients=1, paraphrases=0, successors=1)
        return [full, fewer, greedy, short, few, one]

    def _affordable(
        self, rows: int, held_out: int, width: int, rounds: int, calls: int | None, calls_a_row: float
    ) -> Round | None:
        """Return the settings of the next round, for a beam of so many prompts; None if it can't be paid for."""
        plans = self._plans(rows)
        if calls is None:
            return plans[0]
        for depth in range(min(DEPTH, rounds), 0, -1):
            for plan in plans if depth == 1 else plans[:4]:
                costs = [plan.cost(width if at == 0 else self.beam, held_out, calls_a_row) for at in range(depth)]
                if sum(costs) <= calls:
                    return plan
        return None

    def _held_out(self, rows: int) -> int:
        """Return how many of so many train rows are set aside."""
        count = min(HELD_OUT, rows // 3)
        return count if self.stale_rounds and count >= LEAST_HELD_OUT else 0


class _Successors:
    """The new prompts of one round: no copies of training text, and nothing that was made before."""

    def __init__(self, task: Task, name: str, made: set[str]) -> None:
        self._task = task
        self._name = name
        self._made = made
        self._guard = Guard.of(task.train, task.signatures)
        self._of: dict[str, list[Candidate]] = {}

    def add(self, parent: Candidate, source: Candidate, how: str, texts: Sequence[str], because: str = "") -> None:
        """Add a parent's successors that were made of `source`: of the parent itself, or of an edit of it."""
        siblings = self._of.setdefault(parent.key, [])
        for text in self._guard.originals(texts):
            fresh = source.with_instruction(self._name, text)
            if fresh.key not in self._made:
                self._made.add(fresh.key)
                self._task.made(fresh, source, self._name, how, because)
                siblings.append(fresh)

    def sources(self, parents: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
        """Return what there is to paraphrase, each with its parent: the edits of each parent, and the parent."""
        unique = {parent.key: parent for parent in parents}
        return [(parent, one) for key, parent in unique.items() for one in (*self._of.get(key, []), parent)]

    def drawn(self, most: int) -> list[Candidate]:
        """Return at most so many of each parent's, drawn at random, in the order they were made."""
        kept: list[Candidate] = []
        for siblings in self._of.values():
            chosen = self._task.rng.sample(range(len(siblings)), min(most, len(siblings)))
            kept += [siblings[at] for at in sorted(chosen)]
        return kept


def _best_first(winners: Sequence[Trial]) -> list[Trial]:
    return sorted(reversed(winners), key=lambda trial: -trial.score)  # a tie goes to the later winner


def _stretch(task: Task, rows: Sequence[int], count: int) -> list[int]:
    """Draw rows: a random stretch of the stratified order, so that labels are spread."""
    start = task.rng.randrange(len(rows))
    return [rows[(start + step) % len(rows)] for step in range(min(count, len(rows)))]


def _versions(number: int) -> str:
    return "one version" if number == 1 else f"{number} different versions"
