"""Settings and the command line start without torch: help answers at once, on any machine."""

import subprocess
import sys

import pytest

LIGHT = (
    "ritornello.config",
    "ritornello.limits",
    "ritornello.presets",
    "ritornello.recipes",
    "ritornello.progress",
    "ritornello.cli",
    *(f"ritornello.commands.{verb}" for verb in ("demo", "train", "generate", "runs", "lab", "info", "doctor")),
    *(f"ritornello.commands.{verb}" for verb in ("calibrate", "chat", "eval", "exits", "export", "loading", "writing")),
    *(f"ritornello.commands.{verb}" for verb in ("convert", "loopify", "plan", "serve")),
    *(f"ritornello.planning.{name}" for name in ("memory", "plan", "report")),
)


def heavy_modules_after_importing(module: str) -> str:
    code = f"import {module}, sys; print(*(m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_nothing_heavy(module: str) -> None:
    assert heavy_modules_after_importing(module) == ""


def test_control_a_heavy_module_is_noticed() -> None:
    assert "torch" in heavy_modules_after_importing("ritornello.device")


def test_every_verb_is_checked() -> None:
    from ritornello.cli import VERBS

    assert {f"ritornello.commands.{verb}" for verb in VERBS} <= set(LIGHT)
