"""Where the time of a step goes, as a trace to open in https://ui.perfetto.dev."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ritornello.train import files

WARMUP = 2  # steps that are left out: the first ones also allocate and compile


@contextmanager
def profiling(run_dir: Path, n_steps: int) -> Iterator[Callable[[], None]]:
    """Call what this gives after every step: `n_steps` of them, after WARMUP, go to `run_dir`/profile/trace.json.gz."""
    if not n_steps:
        yield lambda: None
        return

    def write(done: profile) -> None:
        with files.create_directory(run_dir / "profile") as folder:
            done.export_chrome_trace(str(folder / "trace.json.gz"))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=0, warmup=WARMUP, active=n_steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
