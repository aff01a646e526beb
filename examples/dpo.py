"""Make a model prefer one of two answers, by TRL's DPOTrainer: `python examples/dpo.py [RUN] [--data FILE.jsonl]`.

RUN is a run of `ritornello train`, by default the shipped model of Python source. The data are rows of {"prompt": …,
"chosen": …, "rejected": …}, by default strings in double quotes against single ones. An adapter is trained: without it
the same weights are the reference (2305.18290).
"""

import argparse
import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from ritornello import load
from ritornello.hub.export import tokenizer_of, wrapped
from ritornello.recipes import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", nargs="?", default="python")
parser.add_argument("--data")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--loops", type=int, default=4)
parser.add_argument("--out", default=tempfile.gettempdir() + "/dpo")
args = parser.parse_args()

set_seed(0)
loaded = load(find_model(args.run), device="cpu")
model, tokenizer = wrapped(loaded), tokenizer_of(loaded)
model.config.default_loops = args.loops
words = [
    a + b for a in ("data", "file", "line", "user", "test", "node") for b in ("", "s", "_name", "_id", "_path", "0")
]
pairs = [{"prompt": f"{word} =", "chosen": f' "{word}"\n', "rejected": f" '{word}'\n"} for word in words]
rows = Dataset.from_json(args.data) if args.data else Dataset.from_list(pairs)
rows = rows.shuffle(seed=0)
train, held_out = rows.skip(9), rows.take(9)
options = {"per_device_train_batch_size": 8, "learning_rate": 2e-3, "logging_steps": 10, "beta": 0.1}
config = DPOConfig(args.out, max_steps=args.steps, report_to=[], use_cpu=True, **options)
trainer = DPOTrainer(
    model,
    args=config,
    train_dataset=train,
    eval_dataset=held_out,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
before = trainer.evaluate()
trainer.train()
trainer.save_model()
after = trainer.evaluate()
for name in ("rewards/margins", "rewards/accuracies"):
    print(f"held-out {name} {before[f'eval_{name}']:.3f} -> {after[f'eval_{name}']:.3f}")
print(f"the adapter is in {args.out}")
