"""Which model a command's argument names."""

from pathlib import Path
from typing import TYPE_CHECKING

from ritornello.recipes import find_model, is_exported

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
