"""What reading from a stream costs: `python -m benchmarks.streaming [FOLDER]`; makes Parquet files in FOLDER (/tmp).

Throughput of blocks and the memory of a process that reads all of a 200 MB file, beside one that does nothing. What a
loop of steps, each of the time that a training of so many tokens a second takes, waits for blocks, with and without the
thread that makes the next one.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from ritornello.config import DataConfig
from ritornello.train.blocks import Blocks
from ritornello.train.streamed import Streamed, StreamedBatches, open_data

MB = 10**6
LARGE, SMALL = 200, 20  # MB of text in a file
READ = {"source": LARGE, "stream_bytes": 1 << 26}
BPE: dict[str, Any] = {"tokenizer": "bpe", "bpe_vocab_size": 4096}
KINDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "read bytes": READ,
    "read bpe": READ | BPE,
    "pace 60000 bpe": {"source": SMALL, "stream_bytes": 2 * MB} | BPE,
    "pace 60000 bpe, no thread": {"source": SMALL, "stream_bytes": 2 * MB} | BPE,
}


def file(folder: Path, size: int) -> Path:
    """Documents of about 3 kB of words from a vocabulary of 20,000, zipf-like, in row groups of 1,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"ritornello-stream-{size}.parquet"
    if path.exists():
        return path
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    with pq.ParquetWriter(path, pa.schema([("text", pa.string()), ("n", pa.int64())]), compression="none") as out:
        n_bytes = 0
        while n_bytes < size * MB:
            texts = [" ".join(rng.choices(words, weights, k=rng.randint(50, 900))) for _ in range(1000)]
            out.write_table(pa.table({"text": texts, "n": range(len(texts))}))
            n_bytes += sum(map(len, texts))
    return path


def child(kind: str, folder: Path) -> dict[str, Any]:
    peak: dict[str, int] = {}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    time.sleep(0.1)
    found: dict[str, Any] = {}
    if settings := KINDS[kind]:
        path = file(folder, settings["source"])
        data = DataConfig(**settings | {"source": str(path)}, seq_len=256, streaming=True, validation_fraction=0.01)
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            dataset = open_data(data, cache)
            assert isinstance(dataset, Streamed)
            first = time.perf_counter() - start
            read = paced if kind.startswith("pace") else throughput
            found = {"first_s": first} | read(dataset, kind)
            dataset.blocks.close()
    return found | {f"{name}_mb": kb * 1024 / MB for name, kb in peak.items()}


def watch(peak: dict[str, int]) -> None:
    """What this process has for itself, and of files that it maps, which the system takes back when it needs memory."""
    while True:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        for name in ("RssAnon", "RssFile"):
            peak[name] = max(peak.get(name, 0), int(status.split(f"{name}:")[1].split()[0]))
        time.sleep(0.005)


def throughput(dataset: Streamed, kind: str) -> dict[str, Any]:
    """One pass over the file, a part of the rows of each block read; the first block is there already."""
    reader, step, start = StreamedBatches(dataset.blocks, batch_size=16, seed=0), 0, time.perf_counter()
    while (entry := dataset.blocks.holding(step * 16)[1]).after.epoch == 0:
        reader.batch(step)
        step += max(1, entry.n_rows // 64)
    seconds = time.perf_counter() - start
    n_tokens = (entry.end_row - dataset.blocks.holding(0)[1].end_row) * 256
    return {"n_tokens": n_tokens, "tok_per_s": n_tokens / seconds}


def paced(dataset: Streamed, kind: str) -> dict[str, Any]:
    if "no thread" in kind:
        Blocks._begin = lambda self, number: None
    reader, step, start, per_step = StreamedBatches(dataset.blocks, batch_size=64, seed=0), 0, time.perf_counter(), 0.0
    while dataset.blocks.holding(step * 64)[0] < 6:
        begun = time.perf_counter()
        reader.batch(step)
        per_step = max(per_step, time.perf_counter() - begun)
        time.sleep(64 * 256 / float(kind.split()[1]))
        step += 1
    loop = {"seconds": time.perf_counter() - start, "waited_s": dataset.blocks.waited, "longest_wait_s": per_step}
    return {"n_steps": step, **loop}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], Path(sys.argv[3]))))
        return
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp")
    for size in (LARGE, SMALL):
        print(file(folder, size).stat().st_size / MB, "MB")
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.streaming", "--child", kind, str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(kind, *(f"{name}={value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
