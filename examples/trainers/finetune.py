"""Fine-tuning: a network trained on digits 0 to 4 learns 5 to 9 from 200 images."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float().reshape(-1, 1, 8, 8) / 16
first, rest = torch.where(labels < 5)[0], torch.where(labels > 4)[0]
body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
model = nn.Sequential(*body, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def train(optimizer, index, epochs):
    for _ in range(epochs):
        for part in index[torch.randperm(len(index))].split(20):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()


train(torch.optim.AdamW(model.parameters(), 1e-3), first, 5)
model[-1] = nn.Linear(64, 10)
optimizer = AdamWLW(model)
train(optimizer, rest[:200], 20)

model.eval()
with torch.no_grad():
    found = model(images[rest])
loss = F.cross_entropy(found[200:], labels[rest[200:]]).item()
right = (found.argmax(1) == labels[rest])[200:].float().mean().item()
print(f"loss {loss:.4f}, right {right:.3f}, on images not trained on")
