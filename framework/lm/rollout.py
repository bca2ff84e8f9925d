"""Rollouts: DSPy asks a question again under another `rollout_id`, or for `n` answers, and no request holds either."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import dspy

from preceptor.lm.ledger import rollout, several


class RolloutLM(dspy.LM):
    """A `dspy.LM` each of whose rollouts is a draw of its own, and so is each of the answers asked for at once."""

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        """Answer one request."""
        with self._apart(kwargs):
            return super().__call__(prompt, **kwargs)

    async def acall(self, prompt: Any = None, **kwargs: Any) -> Any:
        """Answer one request without blocking the event loop."""
        with self._apart(kwargs):
            return await super().acall(prompt, **kwargs)

    def _apart(self, kwargs: dict[str, Any]) -> ExitStack:
        settings, entered = {**self.kwargs, **kwargs}, ExitStack()
        entered.enter_context(rollout(settings.get("rollout_id")))
        if (count := settings.get("n") or 1) > 1:
            entered.enter_context(several(count))
        return entered
