"""Clients that have gone: what they asked for is dropped, so that nobody pays for what nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

from fastapi import Request

from preceptor.serving.refused import Refused
from preceptor.serving.watch import Metrics


@asynccontextmanager
async def while_there(request: Request, metrics: Metrics) -> AsyncGenerator[None]:
    """Cancel what is done here for a request when its client goes: rows that wait are never asked for.

    Args:
        request: Its body was read.
        metrics: Count it as a failure, `client_gone`.

    Raises:
        Refused: 499 if the client went; nobody reads it but the log.
    """
    task, has_gone = cast("asyncio.Task[None]", asyncio.current_task()), False

    async def watch() -> None:
        nonlocal has_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_gone or task.uncancel() > 0:
            raise
    finally:
        watching.cancel()
    if has_gone:
        metrics.failures.labels("client_gone").inc()
        raise Refused(499, "The client has gone.", "client_gone")
