"""A model as lm-eval's harness asks it: runs, models that come along, and exported folders.

    python -m ritornello.hub.harness --model ritornello --model_args pretrained=RUN,loops=8 --tasks NAME …

is lm-eval's own command line with this model type known to it; elsewhere, importing this module makes it known.
"""

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ritornello.config import MAX_LOOPS, ExitName, require, require_choice, require_int
from ritornello.device import pick_device
from ritornello.engine.generate import load
from ritornello.hub.configuration import RitornelloConfig
from ritornello.hub.export import tokenizer_of, wrapped
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.native import load_exported
from ritornello.model.halting import check_exit
from ritornello.recipes import find_model, is_exported

DEPTH = ("default_loops", "exit_rule", "exit_threshold", "min_loops")
OPTIONS = (  # of HFLM: those that do not ask it to load a model in another way
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache"),
    *("add_bos_token", "prefix_token_id", "softmax_dtype", "mixed_precision_dtype"),
    *("chat_template_args", "enable_thinking", "think_end_token"),
)


@register_model("ritornello")
class Harness(HFLM):
    """HFLM, with a depth.

    Args:
        pretrained: a run, a checkpoint, the name of a model that comes along, or an exported folder.
        loops: depth, with `exit` the most it may reach; None: the model's own.
        exit, exit_threshold, min_loops: as of `ExitRule`; None: a folder's own, else depth is forced.
        options: those of HFLM in `OPTIONS`.

    Raises:
        ValueError: no model there, an argument that is none, or a depth that cannot be.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        loops: int | None = None,
        exit: ExitName | None = None,
        exit_threshold: float | None = None,
        min_loops: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            require_choice("model_args", name, ("loops", "exit", "exit_threshold", "min_loops", "device", *OPTIONS))
        self.opened, self.tokens, self.weights_sha256 = opened(pretrained)
        config = self.opened.config
        for name, value in zip(DEPTH, (loops, exit, exit_threshold, min_loops), strict=True):
            if value is not None:
                setattr(config, name, value)
        require(min_loops is None or config.exit is not None, "min_loops", min_loops, "given with exit")
        config.use_cache = False  # a text that is given needs none; generate() asks for one
        check_exit(self.opened.native.config, config.exit)
        self.set_depth(config.depth)
        super().__init__(str(pretrained), backend="causal", device=str(pick_device(device or "auto")), **options)

    def set_depth(self, n_loops: int) -> None:
        """Of all that is asked from now on."""
        require_int("loops", n_loops, 1, MAX_LOOPS)
        self.opened.config.default_loops = n_loops

    def _get_config(self, *_: Any, **__: Any) -> None:
        self._config = self.opened.config

    def _create_tokenizer(self, *_: Any, **__: Any) -> None:
        self.tokenizer = self.tokens

    def _create_model(self, *_: Any, **__: Any) -> None:
        self._model = self.opened.to(self._device)  # pyrefly: ignore

    def get_model_info(self) -> dict[str, Any]:
        """For the record, without asking a hub for it."""
        config = self.opened.config
        return {
            "model_num_parameters": self.opened.num_parameters(),
            "model_dtype": self.opened.dtype,
            "model_sha": self.weights_sha256 or "",
            "loops": config.depth,
            "exit": config.exit,
        }


def opened(name_or_path: str | Path) -> tuple[RitornelloForCausalLM, PreTrainedTokenizerBase, str | None]:
    """A model behind transformers' interface, its tokenizer, and the sha256 of a run's weights."""
    path = find_model(name_or_path)
    if not is_exported(path):
        loaded = load(path, device="cpu")
        sha256 = None if loaded.manifest is None else loaded.manifest.weights_sha256
        return wrapped(loaded), tokenizer_of(loaded), sha256
    model = wrapped(load_exported(path, device="cpu"))
    config = RitornelloConfig.from_pretrained(path, local_files_only=True)
    for name in DEPTH:
        setattr(model.config, name, getattr(config, name))
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model, tokenizer, None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
