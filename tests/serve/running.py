"""A server under test, in a thread of the test's process, and what to ask it with."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from ritornello.config import Recipe
from ritornello.engine.generate import Loaded
from ritornello.serve.app import Service, create_app
from ritornello.serve.server import Server, bind, config_for
from ritornello.serve.settings import settings_for
from ritornello.serve.worker import Worker, engine_of
from ritornello.train.tokenizer import ByteTokenizer
from tests.model.builders import build


def small(*, chat: bool = True, **changes: Any) -> Loaded:
    """A float64 model, untied so that it does not just repeat itself."""
    options = {"vocab_size": 264, "max_seq_len": 128, "ffn": "dense", "tie_embeddings": False, "n_loops": 3}
    options |= {"halting": "kl"}
    return Loaded(build(options | changes).eval(), ByteTokenizer(chat=chat), Recipe())


@dataclass(frozen=True)
class Running:
    url: str
    service: Service
    server: Server
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(f"{self.url}/v1/{path}", json={"model": "small", **body})

    def completed(self, prompt: Any = "abc", **body: Any) -> dict[str, Any]:
        answer = self.post("completions", prompt=prompt, **{"temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def settle(self) -> None:
        """Until nothing is under way."""
        wait_until(lambda: self.service.worker.n_texts == 0 and self.service.worker.stats.n_running == 0)


@contextmanager
def running(loaded: Loaded | None = None, *, keys: tuple[bytes, ...] = (), **settings: Any) -> Iterator[Running]:
    loaded = small() if loaded is None else loaded
    found = settings_for(loaded.model.config, "small", **settings)
    engine = engine_of(loaded, n_loops=found.max_loops)
    service = Service.of(loaded, Worker(engine, max_requests=found.max_requests), found)
    app = create_app(service, keys=keys, hosts=() if keys else ("127.0.0.1", "localhost"))
    with bind("127.0.0.1", 0, write_seconds=found.write_seconds) as listening:
        server = Server(config_for(app, service), service)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            with httpx.Client(timeout=30) as client:
                yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, server, client)
        finally:
            server.should_exit = True
            thread.join(10)


def wait_until(true: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
