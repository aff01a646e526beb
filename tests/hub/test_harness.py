"""lm-eval's tasks: the same scores from a run and from its exported folder, alone, in batches and in a sweep."""

import json
import os
from contextlib import chdir
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from ritornello.cli import main
from ritornello.config import ModelConfig
from ritornello.engine.generate import load
from ritornello.hub import harness
from ritornello.hub.export import export
from ritornello.hub.harness import Harness
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.sweep import Sweep, manager_of, sweep
from ritornello.hub.tokenizer import to_transformers
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.recipes import find_model
from ritornello.train.tokenizer import ByteTokenizer
from tests.serve.running import running

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path("tests/hub/tasks")
TASKS = ["keywords", "lines", "written"]
TEXTS = [("def f(", "x):"), ("import", " os"), ("import", " sys"), ("for i in range(len(a)):\n", "    print(a[i])")]
ROUNDING = 1e-5  # nats of a text: other batches, and weights that begin elsewhere in memory, are summed otherwise
EXIT = {"loops": 8, "exit": "kl", "exit_threshold": 0.01, "min_loops": 2}
SMALL = {
    "vocab_size": 257,
    "dim": 16,
    "n_prelude_layers": 1,
    "n_recurrent_layers": 1,
    "n_coda_layers": 1,
    "n_loops": 3,
    "max_seq_len": 64,
    "n_heads": 2,
    "n_kv_heads": 2,
    "head_dim": 8,
    "ffn": "dense",
    "ffn_dim": 32,
}
MIXTURE = {"halting": "act", "read_out": "mixture"}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Tasks name their data from the repository's root; what `datasets` makes of it goes elsewhere; nobody asks what
    machine this is, which takes a second."""
    cache = tmp_path_factory.mktemp("datasets")
    with (
        chdir(ROOT),
        patch.object(datasets.config, "HF_DATASETS_CACHE", cache),
        patch("lm_eval.evaluator.add_env_info"),
    ):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(find_model("python"), tmp_path_factory.mktemp("exported") / "python")


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=FOLDER, include_defaults=False)


def scores(model, manager, **options):
    found = simple_evaluate(model, tasks=TASKS, task_manager=manager, batch_size=4, bootstrap_iters=100, **options)
    return found["results"], answers(found)


def answers(found):
    """What the model said, by task and question."""
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}


@pytest.fixture(scope="module")
def native(manager):
    return {n: scores("ritornello", manager, model_args={"pretrained": "python", "loops": n}) for n in (1, 4)}


def alike(found, expected):
    """Texts to the letter, figures up to rounding."""
    for task, metrics in expected[0].items():
        assert found[0][task] == pytest.approx(metrics, abs=ROUNDING)
        for said, awaited in zip(chain(*found[1][task]), chain(*expected[1][task]), strict=True):
            assert said == (awaited if isinstance(awaited[0], str) else [pytest.approx(awaited[0], abs=ROUNDING)])


def log_likelihoods(lm, texts=TEXTS):
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)], disable_tqdm=True)


def close(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close([x for x, _ in found], [x for x, _ in expected], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("n", [1, 4])
def test_a_run_scores_as_its_folder_does_for_transformers(native, folder, manager, n):
    args = {"pretrained": str(folder), "default_loops": n}
    alike(scores("hf", manager, model_args=args, device="cpu"), native[n])


def test_control_another_depth_scores_otherwise(native):
    (one, said), (four, said_by_four) = native[1], native[4]
    for task, metric in (("keywords", "acc,none"), ("lines", "bits_per_byte,none"), ("written", "exact_match,none")):
        assert one[task][metric] != four[task][metric]
        assert said[task] != said_by_four[task]


def test_so_it_does_with_an_exit_rule(native, folder, manager):
    by_name = ",".join(f"{name}={value}" for name, value in EXIT.items())
    found = scores("ritornello", manager, model_args=f"pretrained=python,{by_name}")
    names = by_name.replace("exit=", "exit_rule=").replace("loops=8", "default_loops=8")
    alike(scores("hf", manager, model_args=f"pretrained={folder},{names}", device="cpu"), found)
    with pytest.raises(AssertionError):
        alike(scores("ritornello", manager, model_args="pretrained=python,loops=8"), found)


def test_a_folder_keeps_its_own_depth_and_rule(folder, tmp_path):
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    own = {"default_loops": 8, "exit_rule": "kl", "exit_threshold": 0.01, "min_loops": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    close(log_likelihoods(Harness(tmp_path)), log_likelihoods(Harness("python", **EXIT)))
    assert Harness(tmp_path).get_model_info()["exit"] == Harness("python", **EXIT).get_model_info()["exit"]


def test_a_sweep_scores_as_each_depth_for_itself(native):
    found = sweep(Sweep("python", depths=[4, 1], batch_size=4), TASKS, folder=FOLDER, bootstrap_iters=100)
    assert {n: (one["results"], answers(one)) for n, one in found.items()} == {n: native[n] for n in (1, 4)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Harness, {"batch_size": 1}), (Sweep, {"batch_size": "auto", "max_batch_size": 3, "max_length": 100})],
    ids=["1", "auto"],
)
def test_any_batch_size_scores_alike(native, manager, kind, options):
    alike(scores(kind("python", loops=4, **options), manager), native[4])


def test_log_likelihoods_are_the_models():
    loaded, expected = load(find_model("python"), device="cpu"), []
    for text in TEXTS:
        whole = list(loaded.tokenizer.encode("".join(text)))
        n = len(loaded.tokenizer.encode(text[0].rstrip()))  # spaces at its end belong to what follows
        with torch.no_grad():
            logits = loaded.model(torch.tensor([whole]), n_loops=3).logits[0, n - 1 : -1]
        picked = logits.log_softmax(-1)[range(len(whole) - n), whole[n:]]
        expected.append((float(picked.sum()), logits.argmax(-1).tolist() == whole[n:]))
    close(log_likelihoods(Harness("python", loops=3, batch_size=4)), expected)
    with pytest.raises(AssertionError):  # of another depth they are not
        close(log_likelihoods(Harness("python", loops=2, batch_size=4)), expected)


def small(**shape):
    """What a path would lead to."""
    tokenizer, config = ByteTokenizer(), ModelConfig(**SMALL | shape)
    model = RitornelloForCausalLM.of(RecurrentDepthTransformer(config, seed=1).eval(), eos_token_id=tokenizer.eos_id)
    return patch.object(harness, "opened", lambda _: (model, to_transformers(tokenizer, max_length=64), None))


@pytest.mark.parametrize("logits_cache", [True, False])
@pytest.mark.parametrize("shape", [{}, {"n_recurrent_layers": 0}, MIXTURE, {"initial_state": "noise"}], ids=str)
def test_models_of_any_kind_are_swept(shape, logits_cache):
    options = {"batch_size": 2, "logits_cache": logits_cache}
    with small(**shape):
        lm = Sweep("", depths=[1, 2, 5], **options)
        for n in (2, 1, 5):
            lm.set_depth(n)
            close(log_likelihoods(lm, TEXTS + TEXTS[:1]), log_likelihoods(Harness("", loops=n), TEXTS + TEXTS[:1]))


def test_a_text_runs_to_the_deepest_once():
    turns = []
    with small():
        lm = Sweep("", depths=[1, 2, 5], batch_size=len(TEXTS))
        block = lm.opened.native.loop_once
        with patch.object(lm.opened.native, "loop_once", lambda *args: turns.append(1) or block(*args)):
            for n in lm.depths:
                lm.set_depth(n)
                log_likelihoods(lm)
            assert len(turns) == 5
            lm.opened.config.exit_rule, lm.opened.config.exit_threshold = "delta", 0.0
            for n in lm.depths:  # an exit rule: no depth answers for another
                lm.set_depth(n)
                log_likelihoods(lm)
            assert len(turns) == 5 + 1 + 2 + 5


def test_conversations_take_the_models_form(folder, tmp_path):
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert Harness(tmp_path).apply_chat_template([{"role": "user", "content": "Why?"}]) == "<user>Why?"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loop": 8}, "did you mean 'loops'"),
        ({"loops": 0}, "loops = 0"),
        ({"exit": "never"}, "exit_rule = 'never'"),
        ({"exit_threshold": 0.1}, "exit_threshold = 0.1"),
        ({"min_loops": 2}, "min_loops = 2"),
        ({"exit": "cumulative", "exit_threshold": 2.0}, "exit threshold = 2.0"),
        ({"device": "abacus"}, "device = 'abacus'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        Harness("python", **options)


def test_no_such_task():
    with pytest.raises(ValueError, match="did you mean 'keywords'"), patch("ritornello.hub.sweep.TaskManager") as found:
        found.return_value = TaskManager(include_path=FOLDER, include_defaults=False)
        manager_of(["keyword"], FOLDER)


def test_the_command(tmp_path, capsys):
    output = tmp_path / "found.json"
    asked = ["python", "--tasks", "keywords,lines", "--tasks-path", str(FOLDER), "--loops", "1,2", "--limit", "3"]
    assert main(["eval", *asked, "--batch-size", "2", "--output", str(output), "--device", "cpu", "-q"]) == 0
    shown, said = capsys.readouterr()
    found = json.loads(output.read_text())
    assert not said and "1 loop" in shown and "2 loops" in shown
    for n in ("1", "2"):
        assert f"{found['results'][n]['results']['lines']['bits_per_byte,none']:.4f}" in shown
    assert found["results"]["1"]["results"] != found["results"]["2"]["results"]
    assert found["weights_sha256"] == load(find_model("python"), device="cpu").manifest.weights_sha256
    assert found["limit"] == 3 and found["versions"]["lm_eval"] and found["exit"] is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--loops", "1,x"], "--loops = 'x'"),
        (["--loops", "0"], "--loops = 0"),
        (["--min-loops", "2"], "--min-loops = 2"),
        (["--batch-size", "many"], "--batch-size = 'many'"),
        (["--output", "/nowhere/found.json"], "--output"),
        (["--limit", "0"], "--limit"),
        (["--tasks-path", "nowhere"], "tasks_path"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_names_mistakes(options, named, capsys):
    assert main(["eval", "python", "--tasks", "keywords", *options]) == 2
    assert named in capsys.readouterr().err


def test_over_http_the_scores_are_the_same(native, folder, manager):
    """lm-eval as a client of `ritornello serve`, which goes as deep as it may."""
    with running(load(find_model("python")), max_loops=4) as server:
        found = simple_evaluate(
            "local-completions",
            model_args={
                "base_url": f"{server.url}/v1/completions",
                "model": "small",
                "tokenizer": str(folder),
                "tokenizer_backend": "huggingface",
                "max_length": 1024,
            },
            tasks=TASKS,
            task_manager=manager,
            batch_size=4,
            bootstrap_iters=100,
        )
    results, said = found["results"], answers(found)
    results["keywords"] = native[4][0]["keywords"]  # two choices of a question are the same tokens: chance is its judge
    alike((results, said), native[4])
