"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import logging
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ritornello.serve.worker import GivenUpError

log = logging.getLogger(__name__)
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Of every answer that is not 200."""

    error: Error


class Refused(HTTPException):
    """An answer that is not 200, with the parameter at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(status, message, names or None)
        self.param, self.code = param, code


def answer(error: HTTPException) -> JSONResponse:
    status = error.status_code
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    param, code = (getattr(error, name, None) for name in ("param", "code"))
    body = Error(message=_plain(str(error.detail)), type=kind, param=param and _plain(param), code=code)
    return JSONResponse({"error": body.model_dump()}, status, error.headers)


def add_handlers(app: FastAPI) -> None:
    """Of the app's exceptions: what FastAPI finds wrong, what Starlette does, what nobody expects."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _told(error.errors())
        return answer(Refused(400, message, param=param))

    @app.exception_handler(GivenUpError)
    async def ended(request: Request, error: GivenUpError) -> JSONResponse:
        return answer(given_up(error))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        log.error("a defect: %s %s", request.method, request.url.path, exc_info=error)
        return answer(HTTPException(500, "a defect of the server; its log has more"))


def _told(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What is wrong with the first field that is, by all ways in which it might be meant; and its name."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body: must be JSON; {first['ctx']['error']}", None
    param = next((str(place) for place in first["loc"][1:]), None)
    mine = [error for error in errors if param is None or str(error["loc"][1:][0]) == param]
    said = dict.fromkeys(_said(error) for error in mine)
    name = "the body" if param is None else param
    return f"{name}: {'; or '.join([*said][:4])}", param


def _said(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is not supported here; leave it out"
    inner = ".".join(str(place) for place in error["loc"][2:] if isinstance(place, int))
    where = f"[{inner}] " if inner else ""
    given = "" if error["type"] == "missing" else f", not {reprlib.repr(error['input'])}"
    return f"{where}{error['msg'][:1].lower()}{error['msg'][1:]}{given}"


def _plain(text: str) -> str:
    """What UTF-8 can hold: a client may have sent half a character."""
    return text.encode("utf-8", "backslashreplace").decode()


NAMES = {"n_loops": "loops", "draft.n_loops": "draft_loops", "draft.n_tokens": "draft_tokens", "n_logprobs": "logprobs"}
NAMES |= {"exit threshold": "exit_threshold", "json_schema": "response_format", "constraint": "response_format"}


def of_mistake(error: ValueError) -> Refused:
    """What the engine's side says of a request, with its field as clients know it."""
    name, found, rest = str(error).partition(" = ")
    name = NAMES.get(name, name)
    code = "context_length_exceeded" if "max_seq_len" in rest else None
    is_name = bool(found) and name.replace("_", "").isalnum()
    return Refused(400, f"{name}{found}{rest}", param=name if is_name else None, code=code)


def given_up(error: GivenUpError) -> Refused:
    return Refused(error.status, str(error), **({"Retry_After": "1"} if error.status == 503 else {}))
