"""ritornello serve"""

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, REAL, TEXT, Command, option
from ritornello.config import MAX_LOOPS, require, require_float, require_int


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Answer OpenAI's clients with a trained model, at any number of loops; a page to try it out is at /.

    Ends at SIGTERM or Ctrl-C, once the texts under way are written; a second one ends it at once.
    """

    path: Annotated[
        Positional[Path],
        arg(metavar="RUN", help="A run, a checkpoint, an exported, converted or published folder, or `python`."),
    ]
    host: Annotated[str, option("Where to listen; others get in by a key only.", metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, INTEGER, option("0 takes any that is free.")] = 8000
    name: Annotated[str | None, TEXT, option("The model's, for clients; RUN's own if not given.")] = None
    api_key_file: Annotated[Path | None, option("Keys that open, one a line.", metavar="FILE")] = None
    max_loops: Annotated[int | None, INTEGER, option("The deepest that may be asked for (4 × its own).")] = None
    max_cost: Annotated[int | None, INTEGER, option("Tokens × texts × loops of a request.")] = None
    max_requests: Annotated[int, INTEGER, option("Texts under way and waiting; more get 429.")] = 128
    memory_mb: Annotated[int | None, INTEGER, option("For keys and values (4 of the longest texts).")] = None
    drain_seconds: Annotated[float, REAL, option("For texts under way when it is told to end.")] = 60
    exact: Annotated[bool, option("The same bits in any company; slower.")] = False
    access_log: Annotated[bool, option("A line for each request.")] = False
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"

    def run(self) -> None:
        keys = self.keys()
        require_int("--port", self.port, 0, 65535)
        require_int("--max-requests", self.max_requests, 1)
        require_float("--drain-seconds", self.drain_seconds, 0)
        for name in ("max_loops", "max_cost", "memory_mb"):
            if (value := getattr(self, name)) is not None:
                require_int(f"--{name.replace('_', '-')}", value, 1, MAX_LOOPS if name == "max_loops" else None)
        local = is_local(self.host)
        require(local or bool(keys), "--host", self.host, "this machine's own, without --api-key-file FILE")
        try:
            import fastapi  # noqa: F401
        except ImportError as error:
            raise ImportError("serve: needs FastAPI; pip install 'ritornello[serve]'") from error

        from ritornello.commands.loading import open_model
        from ritornello.serve.app import Service, create_app
        from ritornello.serve.server import BACKLOG, bind, serve
        from ritornello.serve.settings import LOOPBACK, Settings, settings_for
        from ritornello.serve.worker import Worker, engine_of

        with bind(self.host, self.port, write_seconds=Settings.write_seconds) as listening:
            loaded = open_model(self.path, device=self.device)
            others: dict[str, Any] = {"max_requests": self.max_requests, "drain_seconds": self.drain_seconds}
            others |= {} if self.max_cost is None else {"max_cost": self.max_cost}
            name = self.path.resolve().name if self.name is None else self.name
            settings = settings_for(loaded.model.config, name, max_loops=self.max_loops, **others)
            engine = engine_of(loaded, n_loops=settings.max_loops, memory_mb=self.memory_mb, exact=self.exact)
            service = Service.of(loaded, Worker(engine, max_requests=settings.max_requests), settings)
            hosts = (*LOOPBACK, self.host.lower()) if local and not keys else ()
            app = create_app(service, keys=keys, hosts=hosts)
            host, port = listening.getsockname()[:2]
            listening.listen(BACKLOG)  # who reads the line may come at once
            if not self.common.quiet:
                print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
            serve(app, service, listening, access_log=self.access_log)

    def keys(self) -> list[bytes]:
        if self.api_key_file is None:
            return []
        from ritornello.recipes import read_text

        found = [line.strip() for line in read_text(self.api_key_file).splitlines() if line.strip()]
        ok = bool(found) and all(key.isascii() and key.isprintable() and " " not in key for key in found)
        require(ok, "--api-key-file", str(self.api_key_file), "a file of keys, one a line, of printable ASCII")
        return [key.encode() for key in found]


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
