"""The routes. What they take is in `schema`, what they answer in `answers`, what they refuse in `errors`."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar, get_args

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.sse import EventSourceResponse, format_sse_event
from fastapi_offline import FastAPIOffline
from openai.types import Model
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ritornello import __version__
from ritornello.config import ExitName, ModelConfig, exit_by, shown
from ritornello.engine.calibration import calibration_of
from ritornello.engine.generate import Loaded
from ritornello.model.halting import check_exit
from ritornello.serve import asking, errors
from ritornello.serve.answers import ChatAnswer, Form, TextAnswer, TraceAnswer, TracedToken, made, traced
from ritornello.serve.asking import Asked
from ritornello.serve.errors import ErrorBody, Refused, answer
from ritornello.serve.guard import Guard
from ritornello.serve.metrics import Metrics
from ritornello.serve.schema import ChatBody, CompletionBody, TraceBody, Wishes
from ritornello.serve.settings import Settings
from ritornello.serve.worker import GivenUpError, OverloadedError, Worker
from ritornello.serve.writing import Writing

Found = TypeVar("Found")
PAGE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
STATUSES = {
    400: "Wrong, or not supported.",
    401: "A valid key is wanted.",
    404: "No such thing.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    421: "Another host's name.",
    429: "Too much to do: come back after Retry-After.",
    431: "Too long a head.",
    500: "A defect.",
    503: "On its way out, or stuck.",
}


class Listed(Model):
    """A model, and what may be asked of it."""

    n_loops: int
    max_loops: int
    max_model_len: int
    looped: bool
    chat: bool
    calibrated: bool
    exits: list[str]


class ListedModels(BaseModel):
    object: str = "list"
    data: list[Listed]


class Status(BaseModel):
    status: str


@dataclass
class Service:
    """What the routes share. draining: nothing new is let in."""

    loaded: Loaded
    worker: Worker
    settings: Settings
    metrics: Metrics
    listed: Listed
    draining: bool = False
    n_open: int = 0  # requests with a body that are not answered to their end

    @classmethod
    def of(cls, loaded: Loaded, worker: Worker, settings: Settings) -> "Service":
        return cls(loaded, worker, settings, Metrics(worker), listed(loaded, settings))

    @property
    def fingerprint(self) -> str | None:
        """Of the weights: equal seeds give equal texts where this is equal."""
        manifest = self.loaded.manifest
        return None if manifest is None else f"fp_{manifest.weights_sha256[:16]}"

    def check(self, model: str) -> None:
        """Whether something new may be asked, and of this model."""
        if self.draining:
            raise Refused(503, "the server is on its way out", Retry_After="1")
        if model != self.settings.name:
            known = self.settings.name
            raise Refused(404, f"model = {shown(model)}: must be {known!r}", param="model", code="model_not_found")

    async def read(self, read: Callable[..., Found], body: Any) -> Found:
        """What a body asks for, aside: long texts take their time."""
        self.check(body.model)
        try:
            return await asyncio.to_thread(read, self.loaded, self.settings, body)
        except ValueError as error:
            raise errors.of_mistake(error) from None

    async def begin(self, asked: Asked, form: Form) -> Writing:
        """Let it in; `drop` has to follow."""
        try:
            texts = await self.worker.open(asked.requests, cost=asked.cost)
        except ValueError as error:
            raise errors.of_mistake(error) from None
        self.metrics.prompt_tokens.inc(asked.n_prompt_tokens)
        return Writing(self.worker, texts, asked, form, self.metrics.observe)

    def overloaded(self, error: OverloadedError) -> Response:
        self.metrics.refused.inc()
        return answer(Refused(429, str(error), code="overloaded", Retry_After=str(error.seconds)))

    def drop(self, writing: Writing) -> None:
        self.worker.drop(writing.texts)


class Streamed(EventSourceResponse):
    """Whatever becomes of it, even before its first piece, `close` follows."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], object]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class LeftError(Exception):
    """Nobody waits for this answer any more."""


def create_app(service: Service, *, keys: Sequence[bytes] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """keys, hosts: see `Guard`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.close()

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": says} for status, says in STATUSES.items()
    }
    app = FastAPIOffline(
        redoc_url=None,
        title="Ritornello",
        version=__version__,
        description="A recurrent-depth transformer behind OpenAI's interface. `loops` is a dial.",
        lifespan=lifespan,
        responses=refusals,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if keys else [],  # for the schema: `Guard` looks at it
        separate_input_output_schemas=False,
    )
    app.openapi = partial(_described, app, service.settings)
    errors.add_handlers(app)
    _add_handlers(app, service)
    _add_status(app, service)
    _add_models(app, service)
    _add_writing(app, service)
    _add_trace(app, service)
    app.add_middleware(Guard, keys=keys, hosts=hosts, body_seconds=service.settings.body_seconds)
    app.add_middleware(_Counted, service=service)
    return app


def _described(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The schema, made once: with what this server allows, without the 422 that FastAPI announces for every body and
    nobody gets here."""
    if app.openapi_schema is None:
        found = FastAPI.openapi(app)
        for schema in found["components"]["schemas"].values():
            if {"model", "loops"} <= set(schema.get("properties", ())) and "exit" in schema["properties"]:
                schema["properties"]["model"]["enum"] = [settings.name]
                for name in ("loops", "min_loops"):
                    schema["properties"][name]["anyOf"][0]["maximum"] = settings.max_loops
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
    return app.openapi_schema or {}


def _add_handlers(app: FastAPI, service: Service) -> None:
    """Of what ends a request that is right: no room for it, and nobody who waits for it."""

    @app.exception_handler(OverloadedError)
    async def overloaded(request: Request, error: OverloadedError) -> Response:
        return service.overloaded(error)

    @app.exception_handler(LeftError)
    async def left(request: Request, error: LeftError) -> Response:
        return Response(status_code=499)


def _add_status(app: FastAPI, service: Service) -> None:
    page = files("ritornello.serve").joinpath("playground.html").read_text("utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE, "X-Content-Type-Options": "nosniff"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Status, tags=["status"])
    async def health() -> Response:
        """Whether the engine works."""
        silent = service.worker.silent_for()
        if silent > service.settings.stall_seconds:
            raise Refused(503, "the engine's thread has ended" if silent == float("inf") else "the engine is stuck")
        return JSONResponse({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=Status, tags=["status"])
    async def ready() -> Response:
        """Whether new requests are let in."""
        if service.draining:
            raise Refused(503, "the server is on its way out", Retry_After="1")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["status"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=ListedModels, tags=["models"])
    async def models() -> ListedModels:
        return ListedModels(data=[service.listed])

    @app.get("/v1/models/{model:path}", response_model=Listed, tags=["models"])
    async def model(model: str) -> Listed:
        if model != service.settings.name:
            service.check(model)
        return service.listed


def _add_writing(app: FastAPI, service: Service) -> None:
    async def written(request: Request, body: Wishes, asked: Asked, *, is_chat: bool) -> Response:
        form = Form(
            model=service.settings.name,
            fingerprint=service.fingerprint,
            tokenizer=service.loaded.tokenizer,
            is_chat=is_chat,
            scores=asked.scores,
            per_token=bool(body.loops_per_token),
        )
        writing = await service.begin(asked, form)
        if body.stream:
            options = body.stream_options
            with_usage = options is not None and bool(options.include_usage)
            chunks = writing.stream(with_usage=with_usage, chunk_seconds=service.settings.chunk_seconds)
            return Streamed(_events(chunks), lambda: service.drop(writing))
        try:
            found = await unless_gone(request, writing.whole())
        finally:
            service.drop(writing)
        return Response(found.model_dump_json(exclude_unset=True), media_type="application/json")

    @app.post("/v1/completions", response_model=TextAnswer, tags=["text"])
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue a text, or several."""
        asked = await service.read(asking.completion, body)
        return await written(request, body, asked, is_chat=False)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, tags=["text"])
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer in a conversation. For models that were trained on conversations."""
        asked = await service.read(asking.chat, body)
        return await written(request, body, asked, is_chat=True)


def _add_trace(app: FastAPI, service: Service) -> None:
    @app.post("/v1/trace", response_model=TraceAnswer, tags=["text"])
    async def trace(request: Request, body: TraceBody) -> Response:
        """What each loop would have answered for each token of a text that was written (logit lens)."""
        work, cost = await service.read(asking.to_trace, body)

        async def read() -> list[TracedToken]:
            steps = service.worker.steps(work, cost=cost)
            return [traced(service.loaded.tokenizer, one) async for some in steps for one in some]

        tokens = await unless_gone(request, read())
        found = made(TraceAnswer, object="trace", model=service.settings.name, tokens=tokens)
        return Response(found.model_dump_json(), media_type="application/json")


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[bytes]:
    """As server-sent events. What goes wrong after the beginning is told as one too."""
    try:
        async for chunk in chunks:
            yield format_sse_event(data_str=chunk)
    except (Refused, GivenUpError) as error:
        refused = errors.given_up(error) if isinstance(error, GivenUpError) else error
        yield format_sse_event(data_str=bytes(answer(refused).body).decode())
    yield format_sse_event(data_str="[DONE]")


async def unless_gone(request: Request, work: Awaitable[Found]) -> Found:
    """What `work` gives; raises LeftError, and ends it, where the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise LeftError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def listed(loaded: Loaded, settings: Settings) -> Listed:
    config = loaded.model.config

    def works(check: Callable[[], object]) -> bool:
        try:
            check()
        except ValueError:
            return False
        return True

    return Listed(
        id=settings.name,
        object="model",
        created=int(time.time()),
        owned_by="ritornello",
        n_loops=min(config.n_loops, settings.max_loops),
        max_loops=settings.max_loops,
        max_model_len=config.max_seq_len,
        looped=not config.is_plain,
        chat=loaded.tokenizer.is_chat,
        calibrated=works(lambda: calibration_of(loaded)),
        exits=[name for name in get_args(ExitName) if works(partial(_check, config, name))],
    )


def _check(config: ModelConfig, name: ExitName) -> None:
    check_exit(config, exit_by(name))


class _Counted:
    """Every answer by route and status."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, posts = 499, scope["method"] == "POST"
        self.service.n_open += posts
        too_many = posts and self.service.n_open > self.service.settings.max_open

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if too_many:
                await self.service.overloaded(OverloadedError(1))(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.service.n_open -= posts
            self.service.metrics.requests.labels(route, str(status)).inc()
