"""Lightning on two processes: parameters sharded by FSDP2, accumulation, clipping, the best checkpoint, tested."""

import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lwas_fast import AdamWLW


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):  # Lightning calls this before every fit and test
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        return AdamWLW(self)


lightning.seed_everything(0, verbose=False)
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
data = TensorDataset(images.float()[:1500] / 16, labels[:1500])
best = ModelCheckpoint(tempfile.mkdtemp(), monitor="loss")
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
trainer = lightning.Trainer(
    strategy=strategy, devices=2, max_epochs=10, accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=best,
    logger=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Digits(), DataLoader(data, 8, shuffle=True), DataLoader(data, 250))
(result,) = trainer.test(ckpt_path="best", dataloaders=DataLoader(data, 250), verbose=False)
print(f"loss {result['loss']:.4f} (validation gave {best.best_model_score:.4f})")
