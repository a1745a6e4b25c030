"""Lightning: manual optimization, and mixed precision with a loss scale."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lwas_fast import AdamWLW


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()

    def test_step(self, batch, _):
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return AdamWLW(self)


lightning.seed_everything(0, verbose=False)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
data = TensorDataset(images.float()[:1500] / 16, labels[:1500])
options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
trainer = lightning.Trainer(max_epochs=10, precision="bf16-mixed", **options)
trainer.fit(model := Digits(), DataLoader(data, 32, shuffle=True))
print(f"loss {trainer.test(model, DataLoader(data, 500), verbose=False)[0]['loss']:.4f}")
