"""Your own loop, as for any optimizer of torch."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = AdamWLW(model)

for _ in range(10):
    for index in torch.randperm(1500).split(32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    print(f"loss {F.cross_entropy(model(images[:1500]), labels[:1500]).item():.4f}")
