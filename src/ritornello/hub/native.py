"""An exported folder back as what the rest of this package works with."""

from pathlib import Path
from typing import Any

from ritornello.config import DataConfig, Recipe, require
from ritornello.device import pick_device
from ritornello.engine.generate import Loaded
from ritornello.hub.configuration import RitornelloConfig
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.tokenizer import without_specials
from ritornello.recipes import read_text
from ritornello.train.tokenizer import MAX_BYTES, from_json


def load_exported(path: str | Path, *, device: str = "auto") -> Loaded:
    """The model of a folder that `export` or `save_pretrained` wrote, ready to generate.

    Raises:
        ValueError: weights that are missing, or of another shape; a tokenizer that is none of ours.
    """
    path, target = Path(path), pick_device(device)
    config = RitornelloConfig.from_pretrained(path, local_files_only=True)
    loading: Any = RitornelloForCausalLM.from_pretrained
    model, found = loading(path, config=config, local_files_only=True, output_loading_info=True, dtype="auto")
    wrong = sorted(map(str, found["missing_keys"] | found["unexpected_keys"] | found["mismatched_keys"]))
    require(not wrong, f"{path} weights", wrong, "those of its configuration")
    text = read_text(path / "tokenizer.json", max_bytes=MAX_BYTES)
    shape, tokenizer = config.shape(), from_json(without_specials(text))
    recipe = Recipe(model=shape, data=DataConfig(seq_len=min(DataConfig.seq_len, shape.max_seq_len)))
    return Loaded(model.native.eval().to(target), tokenizer, recipe, path)
