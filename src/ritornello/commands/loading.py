"""Which model a command's argument names."""

from pathlib import Path
from typing import TYPE_CHECKING

from ritornello.recipes import find_model, model_type

if TYPE_CHECKING:
    from ritornello.engine.generate import Loaded


def open_model(name_or_path: str | Path, *, device: str = "auto") -> "Loaded":
    """Of a run, a checkpoint, a model that comes along, a folder that `ritornello export` or `convert` wrote, or one as
    a looped model was published.

    Raises:
        ValueError: none of them; what is damaged is named.
    """
    path = find_model(name_or_path)
    kind = model_type(path)
    if kind == "ritornello":
        from ritornello.hub.native import load_exported

        return load_exported(path, device=device)
    if kind is not None:
        from ritornello.hub.converters import load_published

        return load_published(path, device=device)
    from ritornello.engine.generate import load

    return load(path, device=device)
