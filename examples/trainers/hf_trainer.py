"""Hugging Face's Trainer: fused attention, accumulation, clipping, evaluation, the best checkpoint at the end."""

import tempfile
from pydoc_data.topics import topics

import torch
from torch.utils.data import StackDataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lwas_fast import AdamWLW

torch.manual_seed(0)
text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))  # Python's own help
blocks = text[: len(text) // 64 * 64].view(-1, 64)[torch.randperm(len(text) // 64)]
data = StackDataset(input_ids=blocks, labels=blocks)
train, test = Subset(data, range(6400)), Subset(data, range(6400, 6900))
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4))
optimizer = AdamWLW(model)

arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=2, per_device_train_batch_size=16, gradient_accumulation_steps=2,
    eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, lr_scheduler_type="constant",
    report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, optimizers=(optimizer, None))
trainer.train()
best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
print(f"loss {trainer.evaluate(test)['eval_loss']:.4f} (evaluated at the end of an epoch {best:.4f})")
