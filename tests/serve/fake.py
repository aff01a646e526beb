"""A server that plays the HTTP contract with made-up answers: exact, and waiting midway where a test wants to look."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

PAGE = Path(__file__).parents[2] / "src/ritornello/serve/playground.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
WORDS = (
    "def",
    " area",
    "(",
    "",
    "π",
    ", r",
    "):",
    "\n   ",
    " return",
    " π",
    " *",
    " r",
    " **",
    " 2",
)  # π is two tokens
N_LOOPS, MAX_LOOPS = 6, 24


def loops_of(token: int, asked: int) -> int:
    """Made up: 1 to 6 loops, at most as many as were asked for."""
    return min(asked, 1 + token * 5 % 6)


@dataclass
class Fake:
    """words: a token each, ids are places in it. failure: what the next request gets instead.
    waits_at, breaks_at: the token after which a stream waits until told otherwise, or breaks off.
    seen: every request."""

    words: tuple[str, ...] = WORDS
    chat: bool = False
    looped: bool = True
    key: str | None = None
    waits_at: int | None = None
    breaks_at: int | None = None
    failure: tuple[int, str, dict[str, str]] | None = None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def sent(self, path: str) -> list[dict[str, Any]]:
        return [body for to, body in self.seen if to == path]

    def refusal(self, request: Request) -> Response | None:
        status, message, headers = self.failure or (401, "this key is not known", {})
        self.failure, failing = None, self.failure
        if failing is None and (self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"):
            return None
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": error}, status, headers)

    def model(self) -> dict[str, Any]:
        loops = {"n_loops": N_LOOPS, "max_loops": MAX_LOOPS} if self.looped else {"n_loops": 1, "max_loops": 1}
        exits = ["hazard", "cumulative", "kl", "delta", "entropy"] if self.looped else []
        more = {"max_model_len": 256, "chat": self.chat, "exits": exits, "calibrated": False, "looped": self.looped}
        return {"id": "made-up", "object": "model", "created": 0, "owned_by": "ritornello", **loops, **more}

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        chat = "messages" in body
        if chat:
            yield event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        words = self.words[: body["max_tokens"]]
        for token, word in enumerate(words):
            text = {"delta": {"content": word}} if chat else {"text": word}
            reason = "stop" if token == len(words) - 1 else None
            loops = {"loops": [loops_of(token, body.get("loops", 1))], "token_ids": [token]}
            yield event({"index": 0, **text, **loops, "finish_reason": reason})
            if token == self.breaks_at:
                yield f"data: {json.dumps({'error': {'message': 'out of memory'}})}\n\n"
                break
            while token == self.waits_at:
                await asyncio.sleep(0.01)
        yield "data: [DONE]\n\n"

    def trace(self, body: dict[str, Any]) -> dict[str, Any]:
        """Until its last loop a token's first choice is another word, and what is uncertain halves with each loop."""
        return {"object": "trace", "model": "made-up", "tokens": [self._traced(i, body) for i in body["completion"]]}

    def _traced(self, token: int, body: dict[str, Any]) -> dict[str, Any]:
        n = loops_of(token, body.get("loops", 1))
        choices = [(token, self.words[token], 0.75), (99, " pass", 0.125), (98, "<b>", 0.0625)]
        by_loop = []
        for loop in range(1, n + 1):
            order = choices if loop == n else [choices[1], choices[0], choices[2]]
            shares = zip(order, (0.75, 0.125, 0.0625), strict=True)
            top = [{"id": id, "text": text, "logprob": math.log(p)} for (id, text, _), p in shares]
            by_loop.append({"entropy": 4 * math.log(2) / 2**loop, "top": top})  # 2, 1, 0.5, … bits
        return {"id": token, "text": self.words[token], "loops": n, "by_loop": by_loop}


def event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


def app_of(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.get("/v1/models")
    def models(request: Request) -> Response:
        return fake.refusal(request) or JSONResponse({"object": "list", "data": [fake.model()]})

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    @app.post("/v1/trace")
    async def ask(request: Request) -> Response:
        body = await request.json()
        fake.seen.append((request.url.path, body))
        if refused := fake.refusal(request):
            return refused
        if request.url.path == "/v1/trace":
            return JSONResponse(fake.trace(body))
        return StreamingResponse(fake.stream(body), media_type="text/event-stream")

    return app


class Served:
    """`with Served(fake) as url`: on a free port, until the block ends."""

    def __init__(self, fake: Fake) -> None:
        self.server = uvicorn.Server(
            uvicorn.Config(app_of(fake), port=0, log_level="error", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
            assert self.thread.is_alive(), "the server did not start"
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
