"""HTTP/1.1 by asyncio's streams and little else, so that what is measured is the server and not who asks it."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
LIMIT = 1 << 24  # bytes of a head, or of one event


@dataclass(frozen=True)
class Answer:
    """status 0: the connection was closed without one."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """Of a completion's first choice."""
        return self.json()["choices"][0]["text"]


@dataclass
class Connection:
    """One request at a time; the connection stays open where both sides want that."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """body: bytes as they are, anything else as JSON."""
        self.writer.write(request(method, path, body, **headers))
        return await self.answer(without_body=method == "HEAD")

    async def answer(self, *, without_body: bool = False) -> Answer:
        try:
            status, headers = await self.head()
            parts = [] if without_body else [part async for part in self.parts(headers)]
        except (asyncio.IncompleteReadError, ConnectionError):
            return Answer(0)
        return Answer(status, headers, b"".join(parts))

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers; what says that more comes (100) is passed over."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        pairs = (line.partition(":") for line in lines)
        status = int(first.split()[1])
        return (
            await self.head() if status == 100 else (status, {name.lower(): value.strip() for name, _, value in pairs})
        )

    async def parts(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if headers.get("transfer-encoding") == "chunked":
            while n := int(await self.reader.readline() or b"0", 16):
                yield (await self.reader.readexactly(n + 2))[:-2]
            await self.reader.readline()
        elif "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
        else:
            yield await self.reader.read()

    async def stream(self, path: str, body: Any, **headers: str) -> AsyncIterator[bytes]:
        """The data of each server-sent event, the closing [DONE] too. Raises ValueError where there is no stream."""
        self.writer.write(request("POST", path, body, **headers))
        status, found = await self.head()
        if status != 200:
            said = b"".join([part async for part in self.parts(found)])
            raise ValueError(f"{status}: {said[:200]!r}")
        left = b""
        async for part in self.parts(found):
            *whole, left = (left + part).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: "):  # others are comments, to keep the connection
                    yield event[6:]

    def abort(self) -> None:
        """Gone at once, without goodbye."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


def request(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """Header names have _ for -."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    wanted = {"Host": HOST, "Content-Length": str(len(data)), "Content-Type": "application/json"}
    wanted |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in wanted.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + data


@asynccontextmanager
async def connected(port: int, **how: Any) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(HOST, port, limit=LIMIT, **how)
    connection = Connection(reader, writer)
    try:
        yield connection
    finally:
        await connection.close()


async def once(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """A request by a connection of its own."""
    async with connected(port) as connection:
        return await connection.ask(method, path, body, **{"Connection": "close", **headers})
