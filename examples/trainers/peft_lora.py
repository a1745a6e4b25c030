"""peft: a network trained on digits 0 to 4, then LoRA on 5 to 9, saved and loaded."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images, first, rest = images.long(), torch.where(labels < 5)[0], torch.where(labels > 4)[0]
shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
base = BertForSequenceClassification(BertConfig(vocab_size=17, **shape, num_labels=10))


def train(model, optimizer, index, epochs):
    for _ in range(epochs):
        for part in index[torch.randperm(len(index))].split(32):
            optimizer.zero_grad()
            model(images[part], labels=labels[part]).loss.backward()
            optimizer.step()
    model.eval()


train(base, torch.optim.AdamW(base.parameters(), 3e-3), first, 4)
model = get_peft_model(base.train(), LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"]))
optimizer = AdamWLW(model)
train(model, optimizer, rest, 5)
model.save_pretrained(folder := tempfile.mkdtemp())
with torch.no_grad():
    found = F.cross_entropy(model(images[rest]).logits, labels[rest]).item()
    loaded = PeftModel.from_pretrained(model.unload(), folder).eval()
    print(f"loss {F.cross_entropy(loaded(images[rest]).logits, labels[rest]).item():.4f} (before saving {found:.4f})")
