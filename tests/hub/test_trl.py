"""TRL's trainers: the loss is of what it should be, an adapter or the whole model learns."""

import math
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ritornello.hub.tokenizer import to_transformers
from ritornello.train.tokenizer import ByteTokenizer
from tests.hub.kinds import model

# TRL 1.16 and PEFT 0.21 use names that transformers 5.23 is leaving
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning")

CHAT = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- else %}{{ '# ' + m.content + '\n' }}{% endif %}{% endfor %}"""
OPTIONS = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
ADAPTER = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def small(kind):
    return model(kind, vocab_size=257, eos_token_id=256, pad_token_id=256).train()


def tokenizer():
    found = to_transformers(ByteTokenizer(), max_length=64)
    found.chat_template = CHAT
    return found


@pytest.mark.parametrize(("kind", "adapter"), [("moe", None), ("dense", None), ("mla", ADAPTER)])
def test_sft_learns_what_the_assistant_says(kind, adapter, tmp_path):
    turns = [[("user", f"{a} + {b}"), ("assistant", str(a + b))] for a in range(4) for b in range(4)]
    rows = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in each]} for each in turns])
    args = SFTConfig(str(tmp_path), assistant_only_loss=True, learning_rate=3e-3, **OPTIONS)
    found, words = small(kind), tokenizer()
    own = []
    for (_, question), (_, answer) in turns:
        ask, say = (words(text)["input_ids"] for text in (f"# {question}\n", answer + words.eos_token))
        logits = found.eval()(torch.tensor([ask + say])).logits[0, len(ask) - 1 : -1]
        own.append(torch.nn.functional.cross_entropy(logits, torch.tensor(say), reduction="none"))
    ran = SFTTrainer(
        found, args, train_dataset=rows, eval_dataset=rows, processing_class=words, peft_config=deepcopy(adapter)
    )
    before = {name: p.detach().clone() for name, p in ran.model.named_parameters()}
    first = ran.evaluate()["eval_loss"]
    assert first == pytest.approx(torch.cat(own).mean().item(), rel=1e-4)
    ran.train()
    assert ran.evaluate()["eval_loss"] < 0.95 * first
    moved = {name for name, p in ran.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(("lora_" in name) == (adapter is not None) for name in moved)


@pytest.mark.parametrize(("kind", "adapter"), [("moe", ADAPTER), ("dense", None)])
def test_dpo_widens_the_margin(kind, adapter, tmp_path):
    pairs = [{"prompt": f"{a} = ", "chosen": f'"{a}"', "rejected": f"'{a}'"} for a in "abcdefghijklmnop"]
    rows = Dataset.from_list(pairs)
    found = small(kind)
    ran = DPOTrainer(
        found,
        None if adapter else deepcopy(found),
        args=DPOConfig(str(tmp_path), learning_rate=3e-3, **OPTIONS),
        train_dataset=rows.take(12),
        eval_dataset=rows.skip(12),
        processing_class=tokenizer(),
        peft_config=deepcopy(adapter),
    )
    before = ran.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-5) and abs(before["eval_rewards/margins"]) < 1e-5
    ran.train()
    assert ran.evaluate()["eval_rewards/margins"] > 0.02
