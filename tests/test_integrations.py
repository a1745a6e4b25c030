"""Callbacks for trainers, where these are installed (`make trainers` installs them).

Catches: rates that do not reach a trainer's logs, or reach them twice; steps that measure and leave a trace there.
"""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, StackDataset, TensorDataset

from examples.trainers.torchvision import declare_torchvision
from lwas_fast import AdamWLW

declare_torchvision()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from lwas_fast.integrations.lightning import LogRates

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.calls = nn.Linear(3, 2), 0

        def training_step(self, batch, _):
            self.calls += 1
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return AdamWLW(self)

    data = DataLoader(TensorDataset(torch.randn(64, 3), torch.randint(0, 2, (64,))), 4)
    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_epochs=2, logger=logger, callbacks=LogRates(8), accelerator="cpu", log_every_n_steps=1,
        accumulate_grad_batches=2, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model := Model(), data)
    assert model.calls == 32  # a step that measures calls the model once, too
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = [row for row in rows if row["lwas_fast/measurements"]]
    assert [int(row["step"]) for row in logged] == [8, 16]
    assert all(float(row["lwas_fast/applied/net"]) > 0 for row in logged)
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(16))


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")

    from lwas_fast.integrations.transformers import LogRates

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    data = StackDataset(input_ids=torch.randint(0, 9, (64, 5)), labels=torch.randint(0, 2, (64,)))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, logging_steps=4, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    optimizer = AdamWLW(model)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.add_callback(LogRates(trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "lwas_fast/measurements" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    assert sum("loss" in entry for entry in trainer.state.log_history) == 3
    assert min(row["refreshes"] for row in optimizer.diagnostics().values()) >= 1
