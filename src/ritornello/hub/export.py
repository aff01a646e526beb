"""A run as a folder that transformers reads, with this package installed or without.

    config.json  generation_config.json  model*.safetensors  tokenizer.json …   what transformers expects of a model
    configuration_ritornello.py  modeling_ritornello.py  ritornello_*.py         the model's code, for trust_remote_code
    README.md

The code is this package's own, its modules side by side: transformers loads nothing deeper.
"""

import ast
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ritornello.config import require
from ritornello.engine.generate import Loaded, load
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.tokenizer import ends, padding_id, to_transformers
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import files

MODELING = "ritornello.hub.modeling"
AUTO_MAP = {
    "AutoConfig": "configuration_ritornello.RitornelloConfig",
    "AutoModel": "modeling_ritornello.RitornelloModel",
    "AutoModelForCausalLM": "modeling_ritornello.RitornelloForCausalLM",
}
KEEP = "keep it as it was published, for read_published"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [recurrent-depth, ritornello]
---
A recurrent-depth transformer: {n_recurrent} layers run {n_loops} times between {n_prelude} before and {n_coda} after;
{n_parameters:,} parameters.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# After `import ritornello.hub` no remote code is needed: the installed package is used.
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, n_loops={n_loops})[0]))
```

`n_loops` is the depth of a call; `default_loops`, `exit_rule` and `exit_threshold` in config.json are for calls that
name none.
"""


def export(run: str | Path, target: str | Path, *, dtype: torch.dtype | None = None, max_shard: str = "5GB") -> Path:
    """Write the model of a run or checkpoint as a folder `target`, whole or not at all.

    dtype: of the weights, None: as they are. max_shard: the largest file, "200MB" for example.

    Raises:
        ValueError: nothing valid in `run`, or something at `target`.
    """
    target = free(target)
    loaded = load(run, device="cpu")
    with created(target) as folder:
        write_model(wrapped(loaded), folder, dtype=dtype, max_shard=max_shard)
        tokenizer_of(loaded).save_pretrained(folder)
    return target


def free(target: str | Path) -> Path:
    """Raise `ValueError` if there is something already."""
    require(not os.path.lexists(target), "target", str(target), "a folder that does not exist yet")
    return Path(target)


@contextmanager
def created(target: Path) -> Iterator[Path]:
    """A folder to write to, which is `target` at the end, whole or not at all."""
    files.make_directory(target.absolute().parent)
    with files.create_directory(target) as folder:
        try:
            yield folder
        except SafetensorError as error:  # how the library tells of a full disk
            raise ValueError(f"{target}: could not be written; {error}") from error


def wrapped(loaded: Loaded) -> RitornelloForCausalLM:
    """The model behind transformers' interface, not copied."""
    tokenizer = loaded.tokenizer
    padding = padding_id(tokenizer, loaded.model.config.vocab_size)
    given = {"eos_token_id": ends(tokenizer), "pad_token_id": padding}
    model = RitornelloForCausalLM.of(loaded.model, **given)
    model.generation_config = GenerationConfig(**given)
    return model


def tokenizer_of(loaded: Loaded) -> PreTrainedTokenizerFast:
    """Its tokenizer, for transformers."""
    config = loaded.model.config
    return to_transformers(loaded.tokenizer, max_length=config.max_seq_len, vocab_size=config.vocab_size)


def write_model(model: RitornelloForCausalLM, folder: Path, *, dtype: torch.dtype | None, max_shard: str) -> None:
    """Weights, configuration, code and card: all but the tokenizer. ValueError for a model that has a loop of its own,
    of which neither the configuration nor the code would tell."""
    config, kind = model.config.shape(), type(model.native)
    require(kind is RecurrentDepthTransformer, "model", kind.__name__, "one whose loop a configuration says", KEEP)
    model.config.architectures, model.config.auto_map = [type(model).__name__], AUTO_MAP
    if dtype is not None:
        _round(model, dtype)
    model.config.dtype = dtype or model.dtype
    model.save_pretrained(folder, max_shard_size=max_shard)
    for name, text in sources().items():
        (folder / name).write_text(text, encoding="utf-8")
    card = CARD.format(
        n_recurrent=config.n_recurrent_layers,
        n_loops=config.n_loops,
        n_prelude=config.n_prelude_layers,
        n_coda=config.n_coda_layers,
        n_parameters=sum(p.numel() for p in model.native.parameters()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _round(model: RitornelloForCausalLM, dtype: torch.dtype) -> None:
    """All but what transformers keeps in float32 when it loads the folder."""
    precise = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in precise):
            parameter.data = parameter.data.to(dtype)


def sources() -> dict[str, str]:
    """By file name, the code of the model and of all that it imports of this package."""
    found: dict[str, str] = {}
    waiting = [MODELING]
    while waiting:
        module = waiting.pop()
        if _file(module) not in found:
            text = _source(module)
            needed = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
            ours = [name for name in needed if name and name.startswith("ritornello.")]
            waiting += ours
            for name in ours:
                text = re.sub(rf"from {re.escape(name)} import", f"from .{_stem(name)} import", text)
            found[_file(module)] = text
    return found


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _file(module: str) -> str:
    return f"{_stem(module)}.py"


def _stem(module: str) -> str:
    """transformers' name for the two files that it looks for, and a flat one for the others."""
    package, _, name = module.rpartition(".")
    named = package == "ritornello.hub" and name in ("configuration", "modeling")
    return f"{name}_ritornello" if named else module.replace(".", "_")
