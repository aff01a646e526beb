"""What a calibration found, as `exit.json` in the directory of the run or checkpoint that it was made for."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ritornello import recipes
from ritornello.config import MAX_LOOPS, ExitName, ExitRule, Measure, require, require_float, require_int, require_kinds
from ritornello.model.halting import LEARNED_RULES
from ritornello.train import checkpoint, files

if TYPE_CHECKING:
    from ritornello.engine.generate import Loaded

EXIT, FORMAT = "exit.json", 1
NAMES: dict[Measure, str] = {"disagreement": "disagreement", "loss": "the rise in loss"}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is promised: with probability `confidence`, an exit by `rule` has a mean risk of at most `risk`.

    The risk of a sequence, in [0, 1], against the same model with `n_loops` loops for every token. `disagreement`: the
    share of its tokens whose likeliest next token is another one. `loss`: by how much the mean loss of its tokens is
    higher, in nats; less than 0 counts as 0, more than 1 as 1.
    """

    rule: ExitName
    n_loops: int
    min_loops: int = 1
    measure: Measure = "disagreement"
    risk: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require_kinds(self)
        for name in ("risk", "confidence"):
            require_float(name, getattr(self, name), 0, 1, open_low=True)
            require(getattr(self, name) < 1, name, 1, "below 1")
        require_int("n_loops", self.n_loops, 2, MAX_LOOPS)
        require_int("min_loops", self.min_loops, 1, self.n_loops - 1)

    @property
    def level(self) -> float:
        """The probability with which the promise may be wrong."""
        return 1 - self.confidence

    @property
    def promise(self) -> str:
        return f"{NAMES[self.measure]} ≤ {self.shown(self.risk)} with {100 * self.confidence:g}% confidence"

    def shown(self, risk: float) -> str:
        return f"{100 * risk:.3g}%" if self.measure == "disagreement" else f"{risk:.3g} nats"

    def exit(self, threshold: float) -> ExitRule:
        return ExitRule(self.rule, threshold, self.min_loops)

    def condition(self, threshold: float) -> str:
        return f"{self.rule} {'≥' if self.rule in LEARNED_RULES else '<'} {threshold:g}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold with its evidence: mean risk and loops of `n_sequences` of `seq_len` tokens, drawn from the text with
    `data_fingerprint`; and the weights that it holds for, those of `step`."""

    format: int = FORMAT
    goal: Goal
    threshold: float
    mean_loops: float
    mean_risk: float
    p_value: float
    n_sequences: int
    seq_len: int
    step: int
    weights_sha256: str
    data_fingerprint: str

    def __post_init__(self) -> None:
        require_int("format", self.format, 1, FORMAT)
        for name in ("n_sequences", "seq_len", "step"):
            require_int(name, getattr(self, name), 1)
        require_float("mean_loops", self.mean_loops, 0, self.goal.n_loops)
        require_float("mean_risk", self.mean_risk, 0, self.goal.risk)
        require_float("p_value", self.p_value, 0, self.goal.level)
        for name in ("weights_sha256", "data_fingerprint"):
            digest = getattr(self, name)
            require(re.fullmatch("[0-9a-f]{64}", digest) is not None, name, digest, "64 hexadecimal digits")
        self.goal.exit(self.threshold)

    @property
    def exit(self) -> ExitRule:
        return self.goal.exit(self.threshold)

    def check_loops(self, n_loops: int | None, field: str) -> None:
        """Raise ValueError where another depth is asked for, by the name of `field`; None: the calibration's."""
        ours = self.goal.n_loops
        require(n_loops in (None, ours), field, n_loops, f"{ours}, which the calibration is for")

    def __str__(self) -> str:
        loops = f"{self.mean_loops:.1f} of {self.goal.n_loops} loops in the mean"
        return f"exit {self.goal.condition(self.threshold)} keeps {self.goal.promise}: {loops}"


def save(found: Calibration, directory: str | Path) -> Path:
    """Write it into the directory of a run or checkpoint, in place of what was found before; returns the file."""
    path = Path(directory, EXIT)
    files.write_atomic(path, checkpoint.sealed(asdict(found)))
    return path


def read(path: Path) -> Calibration:
    """
    Raises:
        ValueError: missing, damaged, or changed by hand: it is evidence, not a setting. The file is named.
    """
    text = recipes.read_text(path)
    body = recipes.parse_json(text, path)
    require(isinstance(body, dict), str(path), body, "a JSON object")
    try:
        found = recipes.validated(Calibration, body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if checkpoint.sealed(asdict(found)) != text.encode():
        raise ValueError(f"{path}: damaged: its checksum differs")
    return found


def calibration_of(loaded: "Loaded") -> Calibration:
    """What was found for these very weights.

    Raises:
        ValueError: nothing, something damaged, or for other weights.
    """
    ok = loaded.path is not None and loaded.manifest is not None
    require(ok, "exit", "calibrated", "used with exact weights from a run: what was found for them holds for no others")
    assert loaded.path is not None and loaded.manifest is not None
    path, remedy = loaded.path / EXIT, "ritornello calibrate makes it"
    require(path.exists(), "exit", "calibrated", f"used where {path} exists", remedy)
    found = read(path)
    if found.weights_sha256 != loaded.manifest.weights_sha256:
        held, here = found.step, loaded.manifest.step
        raise ValueError(f"{path}: holds for the weights of step {held}, not for these of step {here}; {remedy} anew")
    return found


def calibrated(loaded: "Loaded", *, n_loops: int | None = None) -> ExitRule:
    """The exit rule that was calibrated for this model, to be used with `n_loops` (None: the model's own).

    Raises:
        ValueError: there is none for these weights, or it is for another number of loops.
    """
    found, deepest = calibration_of(loaded), loaded.model.config.n_loops if n_loops is None else n_loops
    found.check_loops(deepest, "n_loops")
    return found.exit
