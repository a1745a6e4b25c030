"""Hugging Face's Trainer: fused attention, accumulation, clipping, evaluation, the best checkpoint at the end."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import StackDataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
data = StackDataset(pixel_values=images.float().reshape(-1, 1, 8, 8) / 16, labels=labels)
train, test = torch.utils.data.Subset(data, range(1500)), torch.utils.data.Subset(data, range(1500, 1797))
size = {"image_size": 8, "patch_size": 2, "num_channels": 1}
shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = ViTForImageClassification(ViTConfig(**size, **shape, num_labels=10, hidden_dropout_prob=0.1))
optimizer = AdamWLW(model)

arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=10, per_device_train_batch_size=16, gradient_accumulation_steps=2,
    eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, report_to="none", disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(), logging_strategy="epoch", lr_scheduler_type="constant",
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, optimizers=(optimizer, None))
trainer.train()
print(f"loss {trainer.evaluate(train)['eval_loss']:.4f}, test {trainer.evaluate(test)['eval_loss']:.4f}")
