"""`serve`: a saved program behind HTTP."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import dspy
import typer

from preceptor import program as artifact
from preceptor.cli.compiling import Json, MaxTokens
from preceptor.cli.evaluating import Embedding, Student, load
from preceptor.cli.inputs import REASONING_TOKENS, lm_named, lm_of
from preceptor.cli.view import print_json, say
from preceptor.errors import ConfigError
from preceptor.lm.credentials import check_key
from preceptor.serving.app import application
from preceptor.serving.run import Server, allow_many_connections, listen, log_lines, spare_garbage_collection
from preceptor.serving.service import Service, Source
from preceptor.serving.settings import Keys, Limits, refuse_exposed

DEFAULT = Limits()


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    program: Annotated[Path, typer.Argument(help="A saved program.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model the program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    student: Student = None,
    embedder: Embedding = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Tokens that open it, one a line; PRECEPTOR_TOKEN holds some, too.")
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Needs none; elsewhere only with --anyone-may-ask.")] = (
        False
    ),
    anyone_may_ask: Annotated[
        bool, typer.Option("--anyone-may-ask", help="With --no-token: whoever reaches this machine may ask.")
    ] = False,
    shadow: Annotated[
        Path | None, typer.Option(help="A second program that answers a sample too; /metrics tells how they agree.")
    ] = None,
    shadow_share: Annotated[float, typer.Option(min=0, max=1, help="Of the rows, for the shadow.")] = 0.1,
    concurrency: Annotated[int, typer.Option(min=1, help="Rows answered at a time.")] = DEFAULT.concurrency,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; others get 429.")] = DEFAULT.queue,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take; more gets 504.")] = DEFAULT.seconds,
    max_tokens: MaxTokens = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of one request; more gets 413.")] = DEFAULT.body_bytes,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to wait for requests in flight, told to stop.")] = (
        DEFAULT.drain_seconds
    ),
    log_inputs: Annotated[bool, typer.Option("--log-inputs", help="Log inputs and answers, too.")] = False,
    json: Json = False,
) -> None:
    """Serve a saved program: typed JSON, OpenAI's protocol, metrics and a page to try it.

    SIGHUP reads the program again and puts it in place if it is good; SIGTERM answers what is in flight and ends.
    """
    keys = Keys.found(token_file)
    if no_token and keys:
        raise ConfigError("--no-token, and yet there is a token: unset PRECEPTOR_TOKEN, leave out --token-file.")
    refuse_exposed(host, keys, is_told_twice=no_token and anyone_may_ask)
    limits = Limits(
        concurrency=concurrency,
        queue=queue,
        seconds=timeout,
        output_tokens=max_tokens or REASONING_TOKENS,  # a model's own bound is the lower one
        body_bytes=max_bytes,
        drain_seconds=drain,
    )
    make, read = partial(_model, lm, api_base, max_tokens), partial(_program, student, embedder, lm, api_base)
    with listen(host, port) as listening:  # before a model is loaded: the port may be another's
        source = _source(program, make, read)
        second = _source(shadow, make, read, source.models) if shadow else None
        service = Service(source, limits, shadow=second, share=shadow_share, logs_inputs=log_inputs)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        _announce(service, address, keys, as_json=json)
        log_lines()
        allow_many_connections()
        server = Server(application(service, keys, is_public=no_token and anyone_may_ask), service)
        spare_garbage_collection()
        server.run(sockets=[listening])


def _model(lm: str | None, api_base: str | None, max_tokens: int | None, name: str) -> dspy.LM:
    """Return the model of that name, or the one that was asked for in its place."""
    model = lm_of(name if lm is None else lm, api_base, max_tokens)
    check_key(model)
    return model


def _program(
    student: str | None, embedder: str | None, lm: str | None, api_base: str | None, path: Path
) -> dspy.Module:
    """Return the program, whenever it is read, unless its model has an address that wasn't given."""
    lm_named(artifact.read(path), lm, api_base)
    return load(path, student, embedder)


def _source(
    path: Path,
    make: Callable[[str], dspy.LM],
    read: Callable[[Path], dspy.Module],
    models: dict[str, dspy.LM] | None = None,
) -> Source:
    return Source(path, lm=make, load=read, models={} if models is None else models)


def _announce(service: Service, address: str, keys: Keys, *, as_json: bool) -> None:
    """Say where the server is."""
    told: dict[str, Any] = {"url": address, "program": service.current.digest, "needs_token": bool(keys)}
    if as_json:
        print_json(told)
        sys.stdout.flush()
    else:
        say(f"Serving {service.current.artifact.path} ({service.current.digest}) on {address}; Ctrl-C ends it.")
