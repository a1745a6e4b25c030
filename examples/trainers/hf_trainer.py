"""Hugging Face's Trainer: fused attention, accumulation, clipping, evaluation, the best checkpoint at the end."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import StackDataset, Subset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
patches = images.reshape(-1, 4, 2, 4, 2).sum((2, 4)).flatten(1).long()  # 16 patches of 65 shades: a text
data = StackDataset(input_ids=patches, labels=labels)
train, test = Subset(data, range(1500)), Subset(data, range(1500, 1797))
shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = BertForSequenceClassification(BertConfig(vocab_size=65, **shape, num_labels=10))
optimizer = AdamWLW(model)

arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=15, per_device_train_batch_size=16, gradient_accumulation_steps=2,
    eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, lr_scheduler_type="constant",
    report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, optimizers=(optimizer, None))
trainer.train()
best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
print(
    f"loss {trainer.evaluate(train)['eval_loss']:.4f}, test {trainer.evaluate(test)['eval_loss']:.4f}, best {best:.4f}"
)
