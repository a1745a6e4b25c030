"""Lightning Fabric: a loop of one's own around fabric.backward, in bf16."""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
data = TensorDataset(images.float()[:1500] / 16, labels[:1500])
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = AdamWLW(model)

fabric = Fabric(precision="bf16-mixed", devices=1)
model, optimizer = fabric.setup(model, optimizer)
loader = fabric.setup_dataloaders(DataLoader(data, 32, shuffle=True))
for _ in range(10):
    for x, y in loader:
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()

model.eval()
x, y = (tensor.to(fabric.device) for tensor in data.tensors)
with torch.no_grad():
    print(f"loss {F.cross_entropy(model(x), y).item():.4f}")
