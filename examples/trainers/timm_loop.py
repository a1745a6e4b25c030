"""timm: a ViT with fused attention, timm's loss scaler with clipping, label smoothing."""

import timm
import torch
from sklearn.datasets import load_digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.utils import NativeScaler
from torch.nn import functional as F

from lwas_fast import AdamWLW

torch.manual_seed(0)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float().reshape(-1, 1, 8, 8) / 16
shape = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}
model = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **shape)
optimizer = AdamWLW(model)

device = "cuda" if torch.cuda.is_available() else "cpu"
scaler, criterion = NativeScaler(device), LabelSmoothingCrossEntropy(0.01)
for _ in range(15):
    for index in torch.randperm(1500).split(32):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = criterion(model(images[index]), labels[index])
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())

model.eval()
with torch.no_grad():
    print(f"loss {F.cross_entropy(model(images[:1500]), labels[:1500]).item():.4f}")
