"""python -m benchmarks.torture.serve.watch PORT: asks for /health twenty times a second until its input ends, and then
tells how long each answer took. A process of its own: who asks for much has no time to look at the clock."""

import http.client
import json
import sys
import threading
import time

from benchmarks.client import HOST

EVERY, DEADLINE = 0.05, 30.0


def main() -> None:
    port, over = int(sys.argv[1]), threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    seconds, problems = [], []
    while not over.wait(EVERY):
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(HOST, port, timeout=DEADLINE)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
            problems += [] if status == 200 else [f"/health: {status}"]
        except (OSError, http.client.HTTPException) as error:
            problems.append(f"/health: {type(error).__name__} {error}")
        finally:
            connection.close()
        seconds.append(time.perf_counter() - begun)
    print(json.dumps([seconds, problems]))


if __name__ == "__main__":
    main()
