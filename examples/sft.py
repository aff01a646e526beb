"""Teach a model to answer, by TRL's SFTTrainer: `python examples/sft.py [RUN] [--data FILE.jsonl]`.

RUN is a run of `ritornello train`, by default the shipped model of Python source. The data are rows of
{"messages": [...]}, by default sums. The loss counts what the assistant says; each conversation has a depth of its own,
so that any depth answers afterwards.
"""

import argparse
import tempfile

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ritornello import load
from ritornello.config import TrainConfig
from ritornello.hub.callbacks import RouterBias
from ritornello.hub.collators import RandomDepth
from ritornello.hub.export import tokenizer_of, wrapped
from ritornello.recipes import find_model

# What lies between the generation marks is what the assistant says: its words and their end.
CHAT = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- else %}{{ '# ' + m.content + '\n' }}{% endif %}{% endfor %}"""

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", nargs="?", default="python")
parser.add_argument("--data")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default=tempfile.gettempdir() + "/sft")
args = parser.parse_args()

set_seed(0)
loaded = load(find_model(args.run), device="cpu")
model, tokenizer = wrapped(loaded), tokenizer_of(loaded)
tokenizer.chat_template = tokenizer.chat_template or CHAT  # a run of conversations has its own
sums = [[("user", f"{a} + {b}"), ("assistant", str(a + b))] for a in range(20) for b in range(20)]
rows = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in sums])
rows = (Dataset.from_json(args.data) if args.data else rows).shuffle(seed=0)
train, held_out = rows.skip(40), rows.take(40)
depths = TrainConfig(depth="poisson", mean_loops=3, max_loops=6)
options = {"per_device_train_batch_size": 16, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "logging_steps": 50}
config = SFTConfig(args.out, assistant_only_loss=True, max_steps=args.steps, report_to=[], use_cpu=True, **options)
trainer = SFTTrainer(
    model,
    config,
    RandomDepth(DataCollatorForLanguageModeling(tokenizer.pad_token_id), depths),
    train_dataset=train,
    eval_dataset=held_out,
    processing_class=tokenizer,
    callbacks=[RouterBias()],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
trainer.save_model()
print(f"held-out loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}; the model is in {args.out}")
