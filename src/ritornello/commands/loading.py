"""Which model a command's argument names."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ritornello.recipes import find_model

if TYPE_CHECKING:
    from ritornello.engine.generate import Loaded


def open_model(name_or_path: str | Path, *, device: str = "auto") -> "Loaded":
    """Of a run, a checkpoint, a model that comes along, or a folder that `ritornello export` wrote.

    Raises:
        ValueError: none of them; what is damaged is named.
    """
    path = find_model(name_or_path)
    if is_exported(path):
        from ritornello.hub.native import load_exported

        return load_exported(path, device=device)
    from ritornello.engine.generate import load

    return load(path, device=device)


def is_exported(path: Path) -> bool:
    """Whether the folder's config.json is one of transformers; a damaged one is not."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "ritornello"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
