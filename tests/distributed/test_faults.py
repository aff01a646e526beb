"""What several processes do when one of them dies, fails, hangs or computes nonsense."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.torture.subject import digest
from ritornello.train import checkpoint
from tests.distributed.faults import CASES, LAST, OF_FOUR, STALL_S, STEPS, subject_in

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 1800  # seconds, beside other tests on two cores
Found = dict[str, Any]


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each case came to."""
    folder, size = tmp_path_factory.mktemp(f"of-{request.param}"), request.param
    command = [sys.executable, "-m", "tests.distributed.faults", str(folder / "results.json"), str(folder), str(size)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    found = json.loads((folder / "results.json").read_text())
    assert found.keys() == {"undisturbed", *(CASES if size == 2 else OF_FOUR)}
    assert not any(case["orphans"] for case in found.values())
    return found | {"size": size}


def named(found: Found, case: str, rank: int) -> str:
    return f"process {rank} of {found['size']} (host {socket.gethostname()}, pid {found[case]['pids'][rank]})"


def those(found: Found, case: str) -> Found:
    if case not in found:
        pytest.skip("of two processes")
    return found[case]


@pytest.mark.parametrize(("case", "victim"), [("died", LAST), ("first died", 0)])
def test_a_dead_process_is_named_and_the_run_resumed_bit_for_bit(found: Found, case: str, victim: int) -> None:
    these = those(found, case)
    survivors = [rank for rank in range(found["size"]) if rank != victim]
    assert these["seconds"] < 60 and these["codes"][victim] == -9
    full = f"{named(found, case, victim)} died, after step 2: nothing "
    for rank in survivors:
        assert these["codes"][rank] == 3
        said = these["said"][rank].strip()
        first = rank == survivors[0]
        assert said.startswith(f"[rank {rank}] error: {'' if first else 'stopped: '}process {victim} of ")
        assert "\n" not in said and (full in said) == first and f"{named(found, case, victim)} died" in said
    undisturbed = found["undisturbed"]["steps"]
    assert these["steps"].items() <= undisturbed.items() and len(these["steps"]) in (1, 2)
    assert these["resumed"]["codes"] == [0] * found["size"] and these["resumed"]["left"] == []
    assert these["resumed"]["steps"] == undisturbed and len(set(map(tuple, undisturbed.values()))) == STEPS


def test_a_loss_that_is_no_number_in_one_process_changes_nothing_in_any(found: Found) -> None:
    these = those(found, "poisoned")
    assert these["codes"] == [0] * found["size"]
    steps = these["steps"]
    assert steps["1"] == steps["2"] and len(set(map(tuple, steps.values()))) == STEPS - 1
    assert all("nothing was updated" not in said for said in these["said"])  # a warning, here shown by nobody


def test_three_in_a_row_end_all_processes_and_one_says_so(found: Found) -> None:
    these = those(found, "poisoned on")
    assert these["codes"] == [2] * found["size"]
    assert "step 3: 3 steps in a row" in these["said"][0] and "step 1: 8, 9, 10, 11, 12, 13, 14, 15" in these["said"][0]
    assert these["said"][1:] == [""] * (found["size"] - 1)
    assert these["steps"].keys() == {"1", "2", "3"} and len(set(map(tuple, these["steps"].values()))) == 1


def test_a_full_disk_ends_all_processes(found: Found) -> None:
    these = those(found, "full")
    assert these["codes"] == [2, 3] and these["seconds"] < 30
    assert "checkpoints: no space" in these["said"][0]
    assert f"stopped: {named(found, 'full', 0)} failed: " in these["said"][1]
    assert these["steps"].keys() == {"1"} and not these["left"]


def test_an_error_of_one_process_is_said_by_it_and_its_name_by_the_others(found: Found) -> None:
    these = those(found, "failed")
    assert these["codes"] == [3, 2]
    assert these["said"][1] == "[rank 1] ritornello: error: no good\n"
    assert these["said"][0] == f"[rank 0] ritornello: error: stopped: {named(found, 'failed', 1)} failed: no good\n"


def test_a_process_that_hangs_is_named_with_where_it_is(found: Found) -> None:
    these = those(found, "hangs")
    assert these["codes"] == [3] * found["size"]
    assert f"no step ended for {STALL_S} s: {named(found, 'hangs', LAST)} is at step.py:" in these["said"][0]
    assert all("most recent call first" in said for said in these["said"])


def test_a_process_that_is_stopped_is_named(found: Found) -> None:
    these = those(found, "silent")
    assert these["codes"] == [3, -9]
    assert f"{named(found, 'silent', 1)} does not answer, after step 2" in these["said"][0]


def test_asked_to_stop_all_finish_the_step_and_one_says_where_it_is_saved(found: Found) -> None:
    these = those(found, "asked")
    assert these["codes"] == [130] * found["size"] and len(these["steps"]) == 1
    (step,) = these["steps"]
    assert f"interrupted after step {step}; saved in" in these["said"][0]
    assert these["said"][1:] == [""] * (found["size"] - 1)


def test_torchrun_starts_a_run_again_which_goes_on_bit_for_bit(found: Found, tmp_path: Path) -> None:
    if found["size"] > 2:
        pytest.skip("of two processes")
    recipe = asdict(subject_in(tmp_path).recipe)
    tables = {name: recipe[name] for name in ("model", "data", "train", "parallel")}
    lines = [f"[{name}]\n" + "".join(map(setting, table.items())) for name, table in tables.items()]
    (tmp_path / "small.toml").write_text('name = "small"\n' + "".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["-m", "tests.distributed.restarted", "train", str(tmp_path / "small.toml"), "--resume", "--offline"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    run = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run"), "--device", "cpu"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = run.communicate(timeout=TIMEOUT)
    finally:
        run.terminate()  # and it, those that it started
        run.wait()
    assert run.returncode == 0, said[-8000:]
    # torchrun sees it too, and may end the other one before that has said it
    ours, theirs = r"^\[rank 0\] .*error: process 1 of 2 .* died, after step 2: nothing after ", r"-9\) local_rank: 1 "
    assert re.search(ours, said, re.M) or re.search(theirs, said), said[-8000:]
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    digests = {str(checkpoint.verify(path).step): list(digest(path)) for path in saved}
    assert digests == found["undisturbed"]["steps"]


def setting(item: tuple[str, Any]) -> str:
    """A line of a recipe's file."""
    name, value = item
    return "" if value is None else f"{name} = {json.dumps(value)}\n"
