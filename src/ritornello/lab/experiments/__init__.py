"""One file for each claim; a new experiment is a file and a line here."""

from ritornello.lab.experiments.adaptive_depth import AdaptiveDepth
from ritornello.lab.experiments.base import Experiment
from ritornello.lab.experiments.depth_extrapolation import DepthExtrapolation
from ritornello.lab.experiments.stability import Stability

EXPERIMENTS: dict[str, Experiment] = {
    "depth-extrapolation": DepthExtrapolation(),
    "stability": Stability(),
    "adaptive-depth": AdaptiveDepth(),
}
