"""A model in several processes or machines, on Ray: requests go out, answers come back.

Each worker is a Ray actor that loads the model once. Programs, budget, ledger and files stay in this process: a
call is reserved before it is sent and recorded when its answer is here, so what holds for a model in this process
holds for one on Ray. A wave of rows (`flow.py`) goes to one worker whole, as it would go to the one model here,
and is batched alike; so the answers are the same as well.

`RAY_ADDRESS` names a cluster, whose nodes need preceptor too. Without it Ray is started on this machine, on the
loopback interface, without its dashboard. It is told not to send usage statistics in either case.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from queue import SimpleQueue
from typing import Any, Final, cast

import dspy
import torch
from dspy.lm15 import Request

from preceptor.errors import ConfigError, ModelError
from preceptor.lm import elsewhere
from preceptor.lm.elsewhere import Elsewhere, Result, asked_at
from preceptor.lm.local import LocalLM
from preceptor.lm.meter import batching_engine
from preceptor.lm.seam import load_weights
from preceptor.lm.soft import EmbeddingSpace

_STORE: Final = 128 << 20
"""Bytes of shared memory for objects on their way, on one machine."""

_A_NODE: Final = 2
"""Workers of a node without GPUs, unless their number is given: each holds the model in memory."""

_RESTARTS: Final = 2
"""Times a worker that dies is started again, and its batch sent again."""

_TOGETHER: Final = 8
"""Answers that come back at a time, from a model that gives one a call: sending takes as long for one as for eight.
Always as many, for a worker that takes the place of a dead one sends what is left, told by its number."""


class RayEngine(Elsewhere):
    """A DSPy engine around one model in many workers.

    Args:
        workers: Handles of the actors.
        facts: What one of them says of its model.

    Attributes:
        places: Waves of rows under way: one a worker, and one that is ready when a worker is.
    """

    def __init__(self, workers: Sequence[Any], facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self.places = len(workers) + 1
        self._workers = tuple(workers)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for worker in workers:
            self._free.put(worker)

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        """Yield (index, answer or error) pairs after each batch that a worker has executed."""
        import ray

        worker = self._free.get()
        try:
            for batch in worker.batches.remote(list(requests)):
                yield cast("list[tuple[int, Result]]", ray.get(batch))
        finally:
            self._free.put(worker)

    def count_tokens(self, request: Request) -> int:
        """Return the length of a request's prompt in tokens."""
        import ray

        return cast("int", ray.get(self._workers[0].count_tokens.remote(request)))

    @cached_property
    def embedding_space(self) -> EmbeddingSpace | None:
        """What soft tokens for the model have to look like; None if it takes none."""
        import ray

        return cast("EmbeddingSpace | None", ray.get(self._workers[0].embedding_space.remote()))


class _Worker:
    """What runs in a worker: one model, loaded once."""

    def __init__(self, make: Callable[[], dspy.LM], threads: int) -> None:
        torch.set_num_threads(threads)
        self._lm = make()
        load_weights(self._lm)

    def facts(self) -> dict[str, Any]:
        return elsewhere.facts(self._lm)

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        engine = batching_engine(self._lm)
        if engine is not None:
            yield from engine.batches(requests)
            return
        answers = ((index, self._answer(request)) for index, request in enumerate(requests))
        while some := list(islice(answers, _TOGETHER)):
            yield some

    def count_tokens(self, request: Request) -> int:
        return elsewhere.count_tokens(self._lm, request)

    def embedding_space(self) -> EmbeddingSpace | None:
        return elsewhere.embedding_space(self._lm)

    def _answer(self, request: Request) -> Result:
        try:
            return cast("Any", self._lm.engine).complete(request)
        except Exception as error:  # noqa: BLE001  raised again where the answer is awaited
            return error


def RayLM(make: Callable[[], dspy.LM] | str, workers: int | None = None) -> dspy.LM:  # noqa: N802  reads like dspy.LM
    """Return a `dspy.LM` on a model in several workers; its name and settings are the model's own.

    Args:
        make: Called once in each worker: returns a model on an engine object. Or a name that `LocalLM` takes.
        workers: How many; by default one a GPU of the cluster, or two a node where there are none.

    Raises:
        ConfigError: If Ray isn't installed, or workers < 1.
        ModelError: If no worker can be started, or the model can't be loaded there.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"RayLM needs workers >= 1, got {workers}.")
    ray = _connected()
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = workers or gpus or _A_NODE * len(nodes)
    threads = max(1, min(cpus // count, *(int(node.get("CPU", 1)) for node in nodes)))
    kind = ray.remote(_Worker).options(
        num_cpus=threads if "RAY_ADDRESS" in os.environ else 0,  # on one machine, nobody is to wait for a place
        num_gpus=1 if gpus >= count else 0,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
        max_concurrency=2,  # so that prompts can be measured while a batch runs
    )
    made = partial(LocalLM, make) if isinstance(make, str) else make
    started = [kind.remote(made, threads) for _ in range(count)]
    try:
        facts = ray.get([worker.facts.remote() for worker in started])[0]
    except ray.exceptions.RayError as error:
        raise ModelError(f"A worker of Ray can't load the model: {_last_line(error)}") from error
    return asked_at(RayEngine(started, facts), facts)


def _connected() -> Any:
    """Return Ray, connected to the cluster that `RAY_ADDRESS` names, or started here."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning of what will change
    if not address:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else it listens on every interface
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers get what other processes leave, by 15 steps
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray isn't installed: pip install 'preceptor[ray]'.") from error
    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    here: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": _STORE,
    }
    try:
        ray.init(**({"address": address} if address else here), **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ModelError(f"Ray can't be reached at {address or 'this machine'}: {_last_line(error)}") from error
    return ray


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[-1]
