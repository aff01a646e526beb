"""The models that come along do what their page says."""

import numpy as np
import pytest

from ritornello import generate, load
from ritornello.config import default_exit
from ritornello.lab import cell
from ritornello.lab.measure import Questions, accuracy, correlation_rows, stopping
from ritornello.recipes import find_model


@pytest.mark.parametrize(("name", "beyond", "too_few"), [("chains", 10, 8), ("chains-moe", 6, 3)])
def test_chain_models_reach_further_than_they_were_trained(name: str, beyond: int, too_few: int) -> None:
    found = cell.load(find_model(name))
    assert found.cell.hops == 5 and found.cell.train.max_loops == 8
    task = found.cell.build_task()
    by_loops = accuracy(found.model, Questions.of(found.model, task, (5, beyond), n=16), (too_few, 8, 12))
    assert by_loops[12][beyond] > 0.9 and by_loops[8][5] > 0.9
    assert by_loops[too_few][beyond] < 0.3


def test_chain_model_stops_when_it_is_there() -> None:
    found = cell.load(find_model("chains"))
    rule = default_exit("gate")
    assert rule is not None
    questions = Questions.of(found.model, found.cell.build_task(), (2, 5), n=32)
    used = {k: loops.mean() for k, _, loops in stopping(found.model, questions, rule, max_loops=16)}
    assert used[2] == pytest.approx(3, abs=0.3) and used[5] == pytest.approx(6, abs=0.3)
    (row,) = correlation_rows("x", found, {"gate": rule}, hops=12, max_loops=16, n=2)
    assert row["value"] > 0.9


def test_text_model_takes_different_loops_for_different_tokens() -> None:
    loaded = load(find_model("python"))
    found = generate(loaded, "import os\n", n_loops=12, exit=default_exit("gate"), max_tokens=48, seed=0)
    loops = np.array(found.loops)
    assert np.percentile(loops, 90) >= 2 * np.percentile(loops, 10)


def test_a_path_comes_before_a_name(tmp_path, monkeypatch) -> None:
    assert find_model("python").name == "python" and find_model("python").is_dir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").mkdir()
    assert not find_model("python").is_absolute()
    assert find_model("no-such-model") == find_model("no-such-model").relative_to(".")
