"""Ritornello: recurrent-depth transformers you can read, run and refute.

    from ritornello import RecurrentDepthTransformer, preset, load, generate
    model = RecurrentDepthTransformer(preset("tiny"))
    out = model(tokens, n_loops=16)

Names are imported when they are first used: the command line shows its help without loading torch.
"""

# ruff: noqa: F401  (type checkers read these imports; `_HOMES` does the importing)
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ritornello.config import DataConfig, ExitRule, ModelConfig, Recipe, TrainConfig
    from ritornello.engine.batch import run_file
    from ritornello.engine.calibrate import calibrate
    from ritornello.engine.calibration import calibrated
    from ritornello.engine.constraints import Constraint, Grammars
    from ritornello.engine.engine import Engine
    from ritornello.engine.generate import Generation, Loaded, generate, load, stream
    from ritornello.engine.quantize import quantize
    from ritornello.engine.request import Draft, Event, Request
    from ritornello.engine.sampling import Sampling
    from ritornello.engine.trace import trace
    from ritornello.model.cache import Cache
    from ritornello.model.context import Capture
    from ritornello.model.depth import Depth
    from ritornello.model.rdt import RecurrentDepthTransformer
    from ritornello.model.state import Output
    from ritornello.ops.noise import Key
    from ritornello.presets import PRESETS, preset

try:
    __version__ = version("ritornello")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "config": ("DataConfig", "ExitRule", "ModelConfig", "Recipe", "TrainConfig"),
    "engine.batch": ("run_file",),
    "engine.calibrate": ("calibrate",),
    "engine.calibration": ("calibrated",),
    "engine.constraints": ("Constraint", "Grammars"),
    "engine.engine": ("Engine",),
    "engine.request": ("Draft", "Event", "Request"),
    "engine.generate": ("Generation", "Loaded", "generate", "load", "stream"),
    "engine.quantize": ("quantize",),
    "engine.sampling": ("Sampling",),
    "engine.trace": ("trace",),
    "model.cache": ("Cache",),
    "model.context": ("Capture",),
    "model.depth": ("Depth",),
    "model.rdt": ("RecurrentDepthTransformer",),
    "model.state": ("Output",),
    "ops.noise": ("Key",),
    "presets": ("PRESETS", "preset"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ritornello' has no attribute {name!r}")
    return getattr(import_module(f"ritornello.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
