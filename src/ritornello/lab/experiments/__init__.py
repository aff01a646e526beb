"""One file for each claim; a new experiment is a file and a line here."""

from ritornello.lab.experiments.ablation import Ablation
from ritornello.lab.experiments.adaptive_depth import AdaptiveDepth
from ritornello.lab.experiments.base import Experiment
from ritornello.lab.experiments.certified_depth import CertifiedDepth
from ritornello.lab.experiments.depth_extrapolation import DepthExtrapolation
from ritornello.lab.experiments.loops_vs_cot import LoopsVsCot
from ritornello.lab.experiments.parameter_efficiency import ParameterEfficiency
from ritornello.lab.experiments.routing import Routing
from ritornello.lab.experiments.stability import Stability
from ritornello.lab.experiments.superposition import Superposition
from ritornello.lab.experiments.systematic_generalisation import SystematicGeneralisation
from ritornello.lab.experiments.test_time_depth import DepthAtTest

EXPERIMENTS: dict[str, Experiment] = {
    "depth-extrapolation": DepthExtrapolation(),
    "stability": Stability(),
    "adaptive-depth": AdaptiveDepth(),
    "systematic-generalisation": SystematicGeneralisation(),
    "loops-vs-cot": LoopsVsCot(),
    "certified-depth": CertifiedDepth(),
    "superposition": Superposition(),
    "routing": Routing(),
    "ablation": Ablation(),
    "parameter-efficiency": ParameterEfficiency(),
    "test-time-depth": DepthAtTest(),
}
