"""What training from a stream costs: `python -m benchmarks.streaming [FOLDER [KIND ...]]`,
a 200 MB Parquet file in FOLDER (/tmp).

Throughput of blocks, what a small training waits for them with and without the thread that makes the next one, and the
memory that reading all of the file takes, beside a process that only imports the same.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ritornello.config import DataConfig, ModelConfig, Recipe, TrainConfig

MB = 10**6
SIZE, BLOCK, SEQ_LEN = 200 * MB, 1 << 26, 256
MODEL = ModelConfig(
    dim=128,
    n_loops=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_dim=384,
    n_experts=4,
    n_active_experts=2,
    expert_dim=128,
)
TRAIN = TrainConfig(steps=40, batch_size=16, eval_every=10**6, save_every=10**6, eval_batches=1, log_every=10)


def file(folder: Path) -> Path:
    """Documents of about 3 kB of words from a vocabulary of 20,000, zipf-like, in row groups of 10,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "ritornello-stream.parquet"
    if path.exists() and path.stat().st_size >= SIZE:
        return path
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    with pq.ParquetWriter(path, pa.schema([("text", pa.string()), ("n", pa.int64())]), compression="none") as out:
        n_bytes = 0
        while n_bytes < SIZE:
            texts = [" ".join(rng.choices(words, weights, k=rng.randint(50, 900))) for _ in range(10_000)]
            out.write_table(pa.table({"text": texts, "n": range(len(texts))}))
            n_bytes += sum(map(len, texts))
    return path


def measured(kind: str, path: str) -> dict[str, Any]:
    """In a process of its own: seconds, rows and the peak of its memory."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "--child", kind, path],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, path: str) -> dict[str, Any]:
    from ritornello.train.streamed import Streamed, StreamedBatches, open_data

    data = DataConfig(source=path, seq_len=SEQ_LEN, streaming=True, stream_bytes=BLOCK, validation_fraction=0.01)
    if "bpe" in kind:
        data = replace(data, tokenizer="bpe", bpe_vocab_size=4096)
    found: dict[str, Any] = {}
    peak: dict[str, int] = {}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    time.sleep(0.1)
    with tempfile.TemporaryDirectory() as cache:
        if kind.startswith("read"):
            start = time.perf_counter()
            dataset = open_data(data, cache)
            assert isinstance(dataset, Streamed)
            begun, reader, step = time.perf_counter(), StreamedBatches(dataset.blocks, batch_size=16, seed=0), 0
            first = dataset.train.n_tokens
            while (at := dataset.blocks.holding(step * 16))[1].after.epoch == 0:
                reader.batch(step)
                step += max(1, at[1].n_rows // 64)  # a part of the rows, all over the block
            n_tokens = at[1].first_row * SEQ_LEN
            took = time.perf_counter() - begun
            found = {"first_s": begun - start, "tok_per_s": (n_tokens - first) / took, "n_tokens": n_tokens}
            dataset.blocks.close()
        elif kind.startswith("train"):
            found = training(data, Path(cache), thread="alone" not in kind)
    return found | {f"{name}_mb": kb * 1024 / MB for name, kb in peak.items()}


def watch(peak: dict[str, int]) -> None:
    """What this process has for itself, and of files that it maps, which the system takes back when it needs memory."""
    while True:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        for name in ("RssAnon", "RssFile"):
            peak[name] = max(peak.get(name, 0), int(status.split(f"{name}:")[1].split()[0]))
        time.sleep(0.005)


def training(data: DataConfig, cache: Path, *, thread: bool) -> dict[str, Any]:
    """Blocks of 8 steps, four hundred times smaller than by default."""
    from ritornello.train import blocks, streamed, trainer

    waits: list[blocks.Blocks] = []
    original = streamed.StreamedBatches.__init__

    def noted(self: Any, found: blocks.Blocks, **how: Any) -> None:
        waits.append(found)
        original(self, found, **how)

    streamed.StreamedBatches.__init__ = noted
    if not thread:
        blocks.Blocks._begin = lambda self, number: None
    data = replace(data, stream_bytes=1 << 14, seq_len=128, validation_fraction=0.1)
    recipe = Recipe(name="stream", model=replace(MODEL, vocab_size=4096), data=data, train=TRAIN)
    start = time.perf_counter()
    trainer.train(recipe, out=cache / "run", device="cpu", cache_dir=cache / "cache")
    lines = [json.loads(line) for line in (cache / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = [line["tok_per_s"] for line in lines if "tok_per_s" in line]
    (found,) = waits
    return {
        "seconds": time.perf_counter() - start,
        "tok_per_s": sorted(speed)[len(speed) // 2],
        "waited_s": found.waited,
        "n_blocks": len(found._entries),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:4])))
        return
    path = file(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp"))
    print(f"{path}: {path.stat().st_size / MB:.0f} MB, blocks of {BLOCK / MB:.0f} MB")
    for kind in sys.argv[2:] or ("import", "read", "read-bpe", "train", "train-alone", "train-bpe", "train-bpe-alone"):
        found = measured(kind, str(path))
        print(kind, " ".join(f"{name}={value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
