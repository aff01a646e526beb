"""python -m benchmarks.torture.serve.control FAULT RUN --port N: a server that does one thing wrong, so that what is
said of the real one could have been denied."""

import argparse
import asyncio
import json
import sys
from typing import Any

from benchmarks.client import HOST

FAULTS = "none", "defects", "hangs", "another", "leaks", "drops", "open", "wordless"
TEXT, N_PIECES = " a b c d e f g h", 8
EVERY = 50  # how seldom it goes wrong
SECONDS = 0.02  # a piece


def command(fault: str) -> tuple[str, ...]:
    return sys.executable, "-m", "benchmarks.torture.serve.control", fault


class Control:
    def __init__(self, fault: str) -> None:
        self.fault, self.n_asked, self.running = fault, 0, 0

    async def serve(self, port: int) -> None:
        async with await asyncio.start_server(self.connection, HOST, port, backlog=4096) as server:
            await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                n = next((line.split(":")[1] for line in head.lower().split("\r\n") if "content-length" in line), "0")
                await self.respond(*head.split()[:2], await reader.readexactly(int(n)), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, method: str, path: str, data: bytes, writer: asyncio.StreamWriter) -> None:
        if method != "POST":
            return self.write(writer, 200, self.page(path))
        try:
            body = json.loads(data)
            stream, ok = body.get("stream") is True, isinstance(body, dict)
        except (ValueError, AttributeError, RecursionError):
            stream, ok = False, False
        if not ok:
            error = {"message": "no JSON object", "type": "invalid_request_error", "param": None, "code": None}
            return self.write(writer, 400, {"error": error})
        self.n_asked += 1
        bad = self.n_asked % EVERY == 0 and self.running > 2  # one alone is served well
        if bad and self.fault == "defects":
            return self.write(writer, 500, b"b")
        if bad and self.fault == "hangs":
            await asyncio.sleep(3600)
        if bad and self.fault == "wordless":
            return self.write(writer, 429, {"error": {}})
        self.running += 1
        await self.complete(TEXT if not bad or self.fault != "another" else TEXT.upper(), stream, writer)
        self.running -= 1

    async def complete(self, text: str, stream: bool, writer: asyncio.StreamWriter) -> None:
        """Where the client goes, this raises, and `running` stays."""
        size = len(text) // N_PIECES
        if stream:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for i in range(0, len(text), size):
                await asyncio.sleep(SECONDS)
                if writer.transport.is_closing():
                    raise ConnectionError
                if stream:
                    piece = b"data: " + json.dumps(completion(text[i : i + size])).encode() + b"\n\n"
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        except ConnectionError:
            self.running -= self.fault != "leaks"
            raise
        if stream:
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            self.write(writer, 200, completion(text))

    def page(self, path: str) -> Any:
        if path == "/metrics":
            states = (f"ritornello_requests_{state} {n}\n" for state, n in (("running", self.running), ("waiting", 0)))
            held = (f'ritornello_kv_bytes{{state="{state}"}} 0\n' for state in ("used", "idle"))
            return "".join((*states, *held)).encode()
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "python", "object": "model"}]}
        return {"paths": {"/v1/models": {"get": {}}, "/health": {"get": {}}}}

    def write(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % status)
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))


def completion(text: str) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": "length"}]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("run")
    parser.add_argument("--port", type=int, required=True)
    options, _ = parser.parse_known_args()
    asyncio.run(Control(options.fault).serve(options.port))


if __name__ == "__main__":
    main()
