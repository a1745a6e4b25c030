"""A callback for Hugging Face's Trainer. Training needs none: this one shows in the logs what was measured."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lwas_fast.optimizer import LayerwiseOptimizer


class LogRates(TrainerCallback):  # type: ignore[misc]
    """Add each layer's rate and the counters of ``opt.log()`` to the Trainer's logs, under ``lwas_fast/``.

    The Trainer's own ``learning_rate`` is ``lr``, which is a multiplier here.

    Args:
        trainer: Whose logs; add the callback to it as well: ``trainer.add_callback(LogRates(trainer))``.
    """

    def __init__(self, trainer: Any):
        self._log, self._inside = trainer.log, False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside each entry that has a loss, one of ours."""
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        if self._inside or "loss" not in (kwargs.get("logs") or {}) or not isinstance(optimizer, LayerwiseOptimizer):
            return
        self._inside = True
        try:
            self._log({f"lwas_fast/{name}": value for name, value in optimizer.log().items()})
        finally:
            self._inside = False
