"""The published models' own code, for tests that run beside it."""

from typing import Any

import pytest
import torch

from benchmarks.originals import ORIGINALS, Settings, missing


def original(name: str, settings: Settings, dtype: torch.dtype = torch.float64) -> Any:
    """Such a model of theirs; skips the test where the code is not here."""
    if why := missing(name):
        pytest.skip(why)
    return ORIGINALS[name](settings, dtype)
