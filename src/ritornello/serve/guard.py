"""What a request has to pass before the app sees it: a key, a known host, a body of JSON that comes in time."""

import asyncio
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ritornello.serve.errors import Refused, answer
from ritornello.serve.settings import MAX_BODY, MAX_HEAD

OPEN = ("/", "/health", "/ready")  # without a key; everything else wants one, whether it exists or not
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Guard:
    """keys: any of them opens; none: anyone may come who says `hosts` (none: whatever they say), so that no page of
    another site can reach a server on this machine under a name of its own (DNS rebinding)."""

    app: ASGIApp
    keys: Sequence[bytes]
    hosts: Sequence[str]
    body_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope["path"], scope["method"], Headers(scope=scope))
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
            refused = Refused(431, f"headers: must be {MAX_HEAD} bytes at most", Connection="close")
        if refused is not None:
            await answer(refused)(scope, receive, send)
            return
        await self.app(scope, self._in_time(receive), send)

    def _refused(self, path: str, method: str, headers: Headers) -> Refused | None:
        if self.keys and path not in OPEN and not self._opens(headers.get("authorization", "")):
            return Refused(401, "a valid key is wanted: Authorization: Bearer KEY", WWW_Authenticate="Bearer")
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts and name not in self.hosts:
            return Refused(421, "this server answers under the name it was started with; see --host")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return Refused(415, "Content-Type: must be application/json", Connection="close")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > MAX_BODY:
            return _too_large()
        return None

    def _opens(self, authorization: str) -> bool:
        """Compared with each key in time that tells nothing."""
        scheme, _, given = authorization.partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key) for key in self.keys]
        return scheme.lower() == "bearer" and any(found)

    def _in_time(self, receive: Receive) -> Receive:
        deadline, whole, size = asyncio.get_running_loop().time() + self.body_seconds, False, 0

        async def received() -> Message:
            nonlocal whole, size
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408, f"the body: must be here within {self.body_seconds:g} s", Connection="close"
                ) from None
            whole, size = not message.get("more_body", False), size + len(message.get("body", b""))
            if size > MAX_BODY:
                raise _too_large()
            return message

        return received


def _too_large() -> Refused:
    return Refused(413, f"the body: must be {MAX_BODY} bytes at most", Connection="close")
