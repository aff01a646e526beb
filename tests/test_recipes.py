import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ritornello import recipes
from ritornello.config import DataConfig, ModelConfig, Recipe, TrainConfig
from ritornello.presets import PRESETS

TINY = recipes.read_toml(recipes.find("tiny"))


def shipped() -> list[Path]:
    return sorted(recipes.find("tiny").parent.glob("*.toml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_survive_json(path: Path):
    recipe = recipes.from_mapping(recipes.read_toml(recipes.find(path.stem)))
    assert recipe.name == path.stem
    assert recipes.from_json(recipes.to_json(recipe)) == recipe


@given(
    st.floats(1e-30, 1e30),
    st.integers(0, 2**63 - 1),
    st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/\\."), min_size=1),
)
def test_json_is_exact(lr: float, seed: int, name: str):
    recipe = Recipe(name=name, train=TrainConfig(lr=lr, seed=seed, betas=(0.1, 0.3), eval_loops=(3,)))
    assert recipes.from_json(recipes.to_json(recipe)) == recipe
    assert recipes.from_json(recipes.to_json(replace(recipe, name=name + "x"))) != recipe


def test_defaults_and_presets():
    assert recipes.from_mapping({}) == Recipe()
    recipe = recipes.from_mapping({"model": {"preset": "1b", "attention": "mla", "n_loops": 3}})
    assert recipe.model == replace(PRESETS["1b"], attention="mla", n_loops=3)
    assert recipe.data == DataConfig() and recipes.from_mapping({"model": {"dim": 7}}).model == ModelConfig(dim=7)


def test_apply_sets():
    before = recipes.read_toml(recipes.find("tiny"))
    sets = ["train.lr=1e-2", "train.eval_loops=[1, 3]", "data.source = my corpus.txt", "name='42'", "model.preset=1b"]
    after = recipes.apply_sets(TINY, [*sets, "train.tensorboard=true", "train.lr=5"])
    assert (
        after["train"]["lr"] == 5 and after["train"]["eval_loops"] == [1, 3] and after["train"]["tensorboard"] is True
    )
    assert after["data"]["source"] == "my corpus.txt" and after["name"] == "42" and after["model"]["preset"] == "1b"
    assert before == TINY and recipes.from_mapping(after).train.lr == 5
    assert recipes.apply_sets({}, ["data.seq_len=8"]) == {"data": {"seq_len": 8}}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("x", r"--set = 'x': must be key=value"),
        ("train.lr=nan", r"train\.lr = nan: must be a finite number"),
        ("train.betas=[0.9, inf]", r"train\.betas = inf: must be a finite number"),
        ("train.lr=1e400", r"train\.lr = inf: must be a finite number"),
        ("train.lr=-1", r"train\.lr = -1\.0: must be a finite number in \(0, inf\)"),
        ("train.lr=abc", r"train\.lr = 'abc': must be a valid number"),
        ("train.betas=[0.9]", r"train\.betas\.1 = \[0\.9\]: Field required"),
        ("train.steps=1.0", r"train\.steps = 1\.0: must be a valid integer"),
        ("train.steps=true", r"train\.steps = True: must be a valid integer"),
        ("train.steps=" + "9" * 5000, r"train\.steps = '9+\.\.\.: must be a valid integer"),
        ("train.betas=" + "[" * 100 + "]" * 100, r"train\.betas: nested more than 16 deep"),
        ("train.betas=" + "[" * 10_000, r"train\.betas = .*must be a valid array"),
        ("train.seed=1\nlr = 2", r"train\.seed = '1\\nlr = 2': must be a valid integer"),
        ("name=3", r"name = 3: must be a valid string"),
        ("model=3", r"model = 3: must be a table of settings"),
        ("model.attention=mqa", r"model\.attention = 'mqa': must be 'gqa' or 'mla'"),
        ("model.preset=1bb", r"model\.preset = '1bb': must be one of .*did you mean '1b'"),
        ("model.preset=[]", r"model\.preset = \[\]: must be one of"),
        ("model.n_heads=3", r"model\.n_heads = 3: must be a multiple of n_kv_heads"),
        ("data.seq_len=9999", r"data\.seq_len = 9999: must be <= model\.max_seq_len"),
        ("lr=1", r"'lr': no such setting; did you mean 'train\.lr'"),
        ("train.setps=1", r"'train\.setps': no such setting; did you mean 'train\.steps'"),
        ("trian.lr=1", r"'trian\.lr': no such setting; did you mean 'train\.lr'"),
        ("model.preset.x=1", r"'model\.preset\.x': no such setting"),
        ("na\nme=1", r"'na\\nme': no such setting; did you mean 'name'"),
    ],
)
def test_a_bad_setting_is_one_clear_line(item: str, message: str):
    with pytest.raises(ValueError, match=rf"^{message}") as caught:
        recipes.from_mapping(recipes.apply_sets(TINY, [item]))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_quoted_dotted_key_is_not_a_table():
    with pytest.raises(ValueError, match=r"'train\.lr': no such setting"):
        recipes.from_mapping({"train.lr": 1e-3})
    with pytest.raises(ValueError, match="'unknown': no such setting"):
        recipes.from_mapping({"unknown": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"name": "a", "name": "b"}', "duplicate key 'name'"),
        ('{"train": {"lr": 1, "lr": 1}}', "duplicate key 'lr'"),
        ('{"train": {"lr": NaN}}', "NaN is not a JSON number"),
        ('{"train": {"lr": 1e999}}', "train.lr = inf: must be a finite number"),
        ('{"train": {"steps": ' + "1" * 10_000 + "}}", "not valid JSON"),
        ('{"name": ' + "[" * 100_000, "not valid JSON"),
        ('{"name": ' + "[" * 500 + "]" * 500 + "}", "nested more than 16 deep"),
        ('{"name": "\\ud800"}', "Invalid JSON"),
    ],
)
def test_hostile_json(text: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        recipes.from_json(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\na = 2\n", "not valid TOML: .*overwrite"),
        (b"a = ", "not valid TOML"),
        (b"a = " + b"[" * 10_000, "not valid TOML"),
        (b"a = 1 # \xff\n", "not UTF-8 at byte 8"),
        (b"#" * (recipes.MAX_BYTES + 1), "more than 10000000 bytes"),
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.toml: {message}"):
        recipes.read_toml(tmp_path / "a.toml")


def test_what_is_not_a_file(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        recipes.read_toml(tmp_path / "a.toml")
    with pytest.raises(ValueError, match="not a regular file"):
        recipes.read_toml(tmp_path)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ValueError, match="not a regular file"):
        recipes.read_toml(tmp_path / "pipe.toml")
    with pytest.raises(ValueError, match="cannot be read"):
        recipes.read_toml(tmp_path / ("x" * 300 + ".toml"))


def test_find(tmp_path: Path):
    assert recipes.find("tiny").is_file()
    assert recipes.find(str(tmp_path / "own.toml")) == tmp_path / "own.toml"
    with pytest.raises(ValueError, match=r"recipe = 'tinny': must be one of .*tiny.*did you mean 'tiny'"):
        recipes.find("tinny")


def test_reading_needs_no_torch():
    script = "import sys; from ritornello import recipes as r; r.from_mapping(r.read_toml(r.find('tiny')))"
    check = "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script + check], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", "import sys, numpy" + check], check=False).returncode == 1
