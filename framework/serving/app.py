"""The application: the endpoints of a served program, as FastAPI describes them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ConfigDict, Field, create_model
from starlette.exceptions import HTTPException
from starlette.responses import Response

from preceptor.serving import chat, fields
from preceptor.serving.door import OPEN, TOLD, Door
from preceptor.serving.gone import while_there
from preceptor.serving.refused import Refused
from preceptor.serving.service import Answer, Service
from preceptor.serving.settings import Keys
from preceptor.serving.shapes import Place, Refusal, answer_model, said, told, used, written
from preceptor.serving.watch import note

_CODES: Final[Mapping[int, str]] = {404: "no_such_path", 405: "wrong_method"}
_PAGE: Final[Mapping[str, tuple[str, str]]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def application(service: Service, keys: Keys | None = None, *, is_public: bool = False) -> Door:
    """Return the ASGI application that serves a program.

    Args:
        service: Answers.
        keys: Who may ask; by default anybody on this machine.
        is_public: True to answer clients that call by another name than localhost even without keys.
    """
    keys = keys or Keys()
    app = FastAPI(
        title=service.current.name,
        description="A compiled program. Every refusal is one JSON message.",
        version=version("preceptor"),
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=_life(service),
    )
    app.add_exception_handler(RequestValidationError, _misread)
    app.add_exception_handler(HTTPException, _lost)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(Exception, _broken)
    _add_predictions(app, service)
    _add_program(app, service)
    _add_operations(app, service, keys)
    chat.add_to(app, service, said(400, 401, 404, 408, 413, 415, 421, 422, 429, 502, 503, 504))
    _add_page(app)
    _declare_tokens(app, keys)
    endpoints = frozenset(str(cast("Any", route).path) for route in app.routes)
    return Door(app, service, keys, endpoints, is_public=is_public)


def _declare_tokens(app: FastAPI, keys: Keys) -> None:
    """Say in the OpenAPI document where a token is needed."""
    if keys:
        document = app.openapi()
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in document["paths"].keys() & set(OPEN):
            for operation in document["paths"][path].values():
                operation["security"] = []


def _life(service: Service) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        service.start()
        tasks = set[asyncio.Task[None]]()

        async def reload() -> None:
            with contextlib.suppress(Refused):  # which was logged
                await service.reload()

        def told() -> None:
            task = asyncio.get_running_loop().create_task(reload())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):  # only in main threads
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, told)
        note("ready", program=service.current.name, digest=service.current.digest)
        yield
        await service.stop()
        note("stopped")

    return life


def _add_predictions(app: FastAPI, service: Service) -> None:
    program = service.current
    single = answer_model(program)
    batch = create_model(
        "Batch",
        __config__=ConfigDict(extra="forbid"),
        rows=(
            list[program.inputs],  # type: ignore[name-defined]  # made at run time
            Field(min_length=1, max_length=service.limits.batch_rows, description="One answer each, in this order."),
        ),
    )
    answers = create_model("Answers", answers=(list[single | Refusal], ...))  # type: ignore[valid-type]  # likewise

    async def predict(request: Request, inputs: Any) -> Response:
        start = time.perf_counter()
        given = fields.given(inputs)
        request.scope[TOLD].update(service.shown(inputs=given))
        with service.gate.admitted_request():
            async with while_there(request, service.metrics):
                answer = await service.answer(given, starting=start)
        request.scope[TOLD].update(_noted(answer), **service.shown(outputs=answer.outputs))
        return _json(told(answer))

    async def predict_batch(request: Request, batch: Any) -> Response:
        rows = [fields.given(row) for row in batch.rows]
        request.scope[TOLD].update(service.shown(inputs=rows))
        with service.gate.admitted_request():
            async with while_there(request, service.metrics):
                found = await _each(service, rows)
        failed = sum(isinstance(each, Refused) for each in found)
        outputs = [None if isinstance(each, Refused) else each.outputs for each in found]
        request.scope[TOLD].update(rows=len(rows), failed=failed, **service.shown(outputs=outputs))
        return _json({"answers": [each.body if isinstance(each, Refused) else told(each) for each in found]})

    could = said(400, 401, 408, 413, 415, 421, 422, 429, 502, 503, 504)
    _post(app, "/predict", predict, "inputs", program.inputs, single, could, "Answer one row.")
    _post(app, "/predict/batch", predict_batch, "batch", batch, answers, could, "Answer many rows; some may fail.")


def _post(
    app: FastAPI,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    body: str,
    taken: Any,
    made: Any,
    could: dict[int | str, dict[str, Any]],
    summary: str,
) -> None:
    """Add an endpoint whose body is of a type that is made at run time."""
    endpoint.__annotations__ = {"request": Request, body: taken, "return": Response}
    app.add_api_route(path, endpoint, methods=["POST"], response_model=made, responses=could, summary=summary)


async def _each(service: Service, rows: list[dict[str, Any]]) -> list[Answer | Refused]:
    """Answer rows, a part of the server's places at a time: a batch leaves room for others."""
    found: list[Answer | Refused | None] = [None] * len(rows)
    waiting = iter(enumerate(rows))

    async def work() -> None:
        for at, row in waiting:
            try:
                found[at] = await service.answer(row)
            except Refused as refused:
                found[at] = refused

    workers = min(len(rows), max(1, service.limits.concurrency // 2))
    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())
    return cast("list[Answer | Refused]", found)


def _add_program(app: FastAPI, service: Service) -> None:
    async def program() -> Response:
        """Return what is served: instructions, experts, fields and evidence, without the rows it was tried on."""
        now = service.current
        saved = now.artifact.program
        evidence = {name: value for name, value in now.artifact.evidence.items() if name != "probes"}
        return _json(
            {
                "name": now.name,
                "digest": now.digest,
                "module": saved["module"],
                "lm": now.lm.model,
                "instructions": now.artifact.instructions,
                "router": now.artifact.router,
                "inputs": now.inputs.model_json_schema(),
                "outputs": now.outputs.model_json_schema(),
                "evidence": evidence,
                "preceptor": saved["preceptor"],
            }
        )

    app.add_api_route("/program", program, methods=["GET"], responses=said(401, 421), response_model=dict[str, Any])

    async def route(inputs: Any) -> Response:
        """Say where a row is among the regions and who would answer; no model is asked."""
        if not service.current.is_routed:
            raise Refused(404, "The program that is served has no experts to choose from.", "no_experts")
        experts = service.current.program
        router = experts.router
        with service.gate.admitted_request():
            async with service.gate.place():
                found = await asyncio.to_thread(router.route, fields.given(inputs))
        place = Place(
            expert=experts.expert_of(found.region),
            region=found.region,
            nearest=found.nearest,
            distance=found.distance,
            radius=router.radius,
            distances={name: 1 - at for name, at in zip(router.names, found.cosines, strict=True)},
            experts={name: experts.expert_of(name) for name in router.names},
        )
        return _json(place.model_dump())

    could = said(400, 401, 404, 408, 413, 415, 421, 422, 429, 503)
    _post(app, "/route", route, "inputs", service.current.inputs, Place, could, "Say who would answer a row.")


def _add_operations(app: FastAPI, service: Service, keys: Keys) -> None:
    async def healthz() -> Response:
        """Say that the server runs."""
        return _json({"status": "ok"})

    async def readyz() -> Response:
        """Say whether it takes requests."""
        if not service.is_ready:
            raise Refused(503, "The server isn't ready.", "not_ready", headers={"Retry-After": "1"})
        return _json({"status": "ready"})

    async def metrics() -> Response:
        """Return the metrics in Prometheus' format."""
        service.metrics.busy.set(service.gate.busy)
        service.metrics.admitted.set(service.gate.admitted)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def reload() -> Response:
        """Put the program that is on disk now in the served one's place, if it is good."""
        if not keys:
            raise Refused(403, "Without a token this server is reloaded by SIGHUP only.", "no_keys")
        return _json(await service.reload())

    app.add_api_route("/healthz", healthz, methods=["GET"], response_model=dict[str, str])
    app.add_api_route("/readyz", readyz, methods=["GET"], response_model=dict[str, str], responses=said(503))
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    app.add_api_route(
        "/metrics", metrics, methods=["GET"], response_class=Response, responses={**text, **said(401, 421)}
    )
    could = said(401, 403, 408, 409, 413, 415, 421)
    app.add_api_route("/admin/reload", reload, methods=["POST"], response_model=dict[str, Any], responses=could)


def _add_page(app: FastAPI) -> None:
    folder = files("preceptor.serving") / "page"

    def serving(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
        content = (folder / name).read_bytes()

        async def page() -> Response:
            return Response(content, media_type=kind, headers={"Content-Security-Policy": _POLICY})

        return page

    for path, (name, kind) in _PAGE.items():
        app.add_api_route(path, serving(name, kind), methods=["GET"], include_in_schema=False)


def _noted(answer: Answer) -> dict[str, Any]:
    expert = {} if answer.route is None else {"expert": answer.route["expert"]}
    return {**used(answer.tally), **expert, "program": answer.digest}


def _json(value: Any) -> Response:
    return Response(written(value), media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    refused = cast("Refused", error)
    request.scope[TOLD]["code"] = refused.code
    response = _json(refused.body)
    response.status_code = refused.status
    response.headers.update(refused.headers)
    return response


async def _broken(request: Request, error: Exception) -> Response:
    del error  # raised again and logged by the server
    return await _refused(request, Refused(500, "The server failed; its log says where.", "server_failed"))


async def _misread(request: Request, error: Exception) -> Response:
    """Refuse a body, naming the first field that is wrong; what was given isn't repeated."""
    first: dict[str, Any] = cast("RequestValidationError", error).errors()[0]
    if first["type"] == "json_invalid":
        return await _refused(request, Refused(400, "The request's body is no JSON.", "no_json"))
    field = ".".join(str(each) for each in first["loc"] if each != "body") or None
    is_chat = request.url.path.startswith("/v1/")
    message = f"{field}: {first['msg']}." if field else f"{first['msg']}."
    return await _refused(request, Refused(400 if is_chat else 422, message, "invalid_field", param=field))


async def _lost(request: Request, error: Exception) -> Response:
    found = cast("HTTPException", error)
    if found.status_code == 400:  # FastAPI's word for a body it can't read at all
        return await _refused(request, Refused(400, "The request's body is no JSON.", "no_json"))
    code = _CODES.get(found.status_code, "refused")
    refused = Refused(found.status_code, f"{found.detail}.", code, headers=dict(found.headers or {}))
    return await _refused(request, refused)
