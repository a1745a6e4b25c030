"""A callback for Lightning. Training needs none: this one shows in the loggers what was measured."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lwas_fast.optimizer import LayerwiseOptimizer


class LogRates(Callback):  # type: ignore[misc]
    """Log each layer's rate and the counters of ``opt.log()``, under ``lwas_fast/``.

    Lightning's own LearningRateMonitor shows ``lr``, which is a multiplier here.

    Args:
        every: Steps of the optimizer from one entry to the next; each waits for the device once.
    """

    def __init__(self, every: int = 50):
        self.every, self._logged = every, -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After a batch, if it ended with a step that is to be shown."""
        step = trainer.global_step
        if step == 0 or step % self.every != 0 or step == self._logged:
            return
        self._logged = step
        for logger in trainer.loggers:
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, LayerwiseOptimizer):
                    rows = {f"lwas_fast/{name}": value for name, value in optimizer.log().items()}
                    logger.log_metrics(rows, step=step)
