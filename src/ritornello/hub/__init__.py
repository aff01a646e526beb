"""At home in transformers: importing this makes its Auto classes know `ritornello` models."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("this needs transformers: pip install 'ritornello[hub]'", name="transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ritornello.hub.configuration import RitornelloConfig
from ritornello.hub.modeling import RitornelloForCausalLM, RitornelloForSequenceClassification, RitornelloModel

AutoConfig.register(RitornelloConfig.model_type, RitornelloConfig, exist_ok=True)
AutoModel.register(RitornelloConfig, RitornelloModel, exist_ok=True)
AutoModelForCausalLM.register(RitornelloConfig, RitornelloForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(RitornelloConfig, RitornelloForSequenceClassification, exist_ok=True)

__all__ = ["RitornelloConfig", "RitornelloForCausalLM", "RitornelloForSequenceClassification", "RitornelloModel"]
