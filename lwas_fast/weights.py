"""Which of its two sets of weights a schedule-free optimizer has put into the model, also in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lwas_fast import follow, measure, shards, update, wrappers
from lwas_fast.base import WithLayers
from lwas_fast.interrupts import open_to_interrupts, whole
from lwas_fast.says import warn


class WithAverage(WithLayers):
    """An optimizer whose weights to evaluate are not those that it trains on."""

    def _see(self, seen: measure.Seen, calls: list[measure.Call | None]) -> bool:
        """See `measure.watch.Watcher`."""
        raise NotImplementedError

    def follow(self, model: nn.Module) -> None:
        """Follow a module, as an optimizer does from the start if it is given one: ``AdamWLW(model)``.

        Then its evaluation-mode calls and its ``state_dict()`` see the average of the weights, and its training-mode
        calls the weights to train on. When a measurement is due, a plain ``loss.backward()`` of a loss made from the
        module's output measures. It works by hooks on the module, which go with the optimizer or by `unfollow`; a copy
        of the module is not followed. A module that is trained in evaluation mode should not be followed.

        Args:
            model: The module whose parameters these are, compiled or in DistributedDataParallel as it may be.

        Raises:
            ValueError: It has none of the parameters.
        """
        mine = {param for group in self.param_groups for param in group["params"]}
        if mine.isdisjoint(param for _, param in wrappers.named_parameters(model)):
            raise ValueError(f"follow({type(model).__name__}): this optimizer has none of the module's parameters")
        self.unfollow()
        owner = {"hold": self._hold, "place": self._place, "due": self._due, "see": self._see}
        owner |= {"average_of": self._average_of, "averaged": self.averaged, "restart": self._restart}
        owner |= {"unfollow": self.unfollow}
        self._now.following = follow.Following(model, mine, self, owner)
        self._note_held()

    def _note_held(self) -> bool:
        """Whether the parameters hold the weights to train on; what follows the model is told."""
        trained = all(group["train_mode"] for group in self.param_groups)
        if self._now.following is not None:
            self._now.following.trained = trained
        return trained

    def _model(self) -> nn.Module | None:
        model = None if self._now.following is None else self._now.following.model()
        return None if model is None else wrappers.unwrapped(model)

    def unfollow(self) -> None:
        """Follow no module any more; its parameters hold what they hold (see `train`)."""
        if self._now.following is not None:
            self._now.following.stop()
        self._now.following = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average in the parameters inside, whatever a followed module's mode."""
        following, training = self._now.following, self._note_held()
        pinned = following is not None and following.pinned
        with whole():
            self.eval()
            if following is not None:
                following.pinned = True
            try:
                with open_to_interrupts():
                    yield
            finally:
                if following is not None:
                    following.pinned = pinned
                self.train(training)

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with the average of the weights, in memory of its own."""
        with self.averaged():
            return {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in model.state_dict().items()
            }

    def eval(self) -> None:
        """Put the average of the iterates into the parameters: before evaluating the model, and before saving it.

        Schedule-free optimizers train on other weights than those that are best (see the class). BatchNorm's running
        statistics are those of the weights trained on: run some training batches through the model before it is
        evaluated (``torch.optim.swa_utils.update_bn``). With ``schedule_free=False`` parameters stay as they are, but
        training on asks for `train` all the same.

        Nothing needs it where a module is followed (see `follow`).
        """
        self._hold(training=False)

    def train(self, mode: bool = True) -> None:
        """Put the weights to train on back into the parameters, after `eval`.

        Args:
            mode: False does what `eval` does.
        """
        self._hold(training=mode)

    def _hold(self, training: bool) -> None:
        with whole():
            self._place(at_last=self._now.following is not None)  # else the model may be loaded after this
            update.swap(self.param_groups, self.state, self.rule, [training] * len(self.param_groups))
            if any(shards.mesh_of(param) is not None for group in self.param_groups for param in group["params"]):
                shards.reshard(self._model())
            self._note_held()

    def _average_of(self, param: Tensor) -> Tensor | None:
        group = self._layout.home.get(param)
        return None if group is None else update.average_of(self.rule, group, self.state, param)

    def _restart(self, param: Tensor) -> None:
        """Take a parameter's weights, which were just loaded, for iterate and average at once."""
        if (of_param := self.state.get(param, {})).get("offset") is not None:
            of_param["offset"].zero_()
            update.forget_rounding(of_param)

    def _check_training(self) -> None:
        self._place()
        model = self._model()
        if model is not None and model.training and not self._note_held():
            self._hold(training=True)  # evaluated between backward and step
        update.check_training(self.param_groups, model is not None)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; what is due next stands in the groups, so a measurement on its way is waited for.

        It belongs beside a state of the model with the average in it where a module is followed (or after `eval`), and
        else beside one with the weights trained on. `load_state_dict` notices which of the two the model has.
        """
        with whole():
            return self._saved()

    def _saved(self) -> dict[str, Any]:
        self._hear_outcome()
        self._place(at_last=self._now.following is not None)
        self._layout.attach()
        saved = super().state_dict()
        for group, mine in zip(saved["param_groups"], self.param_groups, strict=True):
            beside_average = self._now.following is not None or not mine["train_mode"]
            for key, param in zip(group["params"], mine["params"], strict=True):
                if key in saved["state"]:
                    saved["state"][key] = update.as_saved(self.rule, mine, saved["state"][key], param, beside_average)
            if any("offset" in self.state.get(param, {}) for param in mine["params"]):
                group["samples"] = update.samples(self.rule, mine, self.state)
            group["train_mode"] = mine["train_mode"] and self._now.following is None
            group |= self._learned()
        return saved

    def _learned(self) -> dict[str, Any]:
        """What was found out about model and loop: without it a resumed run would measure at other steps.

        Not in a distributed run: torch.distributed.checkpoint loads no file that lacks a key which is here.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return {}
        failed = self._now.following is not None and self._now.following.failed
        found: dict[str, Any] = {"replays": True} if failed else {}
        return found | ({"micro_batches": self._now.micro_batches} if self._now.micro_batches > 1 else {})

    def _learn(self) -> None:
        for group in self.param_groups:
            self._now.micro_batches = group.pop("micro_batches", 0)
            if group.pop("replays", False) and self._now.following is not None:
                self._now.following.replays = self._now.following.failed = True

    def _recognise(self) -> None:
        """After loading: find out which weights the model holds, if it was loaded before; else `_place` does so."""
        meant, differ = [group["train_mode"] for group in self.param_groups], []
        for group in self.param_groups:
            if any(shards.mesh_of(param) is not None for param in group["params"]):
                group.pop("samples", None)  # of one that was not sharded
            if known := group.pop("samples", None):
                training, average = update.holds(group, self.state, known)
                if training != average:
                    self._found_to_train(group, training)
                elif training:  # both are the same weights, as far as samples tell
                    continue
                else:
                    self._now.unplaced.append((group, known))
            if any("offset" in self.state.get(param, {}) for param in group["params"]):
                differ.append(group)
        if self._now.following is not None:
            if differ and all(group["train_mode"] for group in differ):
                for group in self.param_groups:  # where there is but one set of weights as well
                    group["train_mode"] = True
            else:  # the others' average is to be loaded yet
                update.swap(self.param_groups, self.state, self.rule, [False] * len(self.param_groups))
            self._note_held()
            self._now.following.due = self._now.following.restored = True
            return
        update.swap(self.param_groups, self.state, self.rule, meant)

    def _found_to_train(self, group: dict[str, Any], training: bool) -> None:
        group["train_mode"] = training
        if training:
            for param in group["params"]:
                update.forget_rounding(self.state.get(param, {}))

    def _place(self, at_last: bool = True) -> bool:
        """Find out the same later, or `at_last`, before the weights are needed; whether it is known now."""
        if not self._now.unplaced:
            return True
        with whole():
            return self._place_now(at_last)

    def _place_now(self, at_last: bool) -> bool:
        unplaced, self._now.unplaced = self._now.unplaced, []
        for group, known in unplaced:
            training, average = update.holds(group, self.state, known)
            if training != average:
                self._found_to_train(group, training)
            if training or average:  # both: they are the same weights, of whichever mode
                continue
            if not at_last:
                self._now.unplaced.append((group, known))
                continue
            for param in group["params"]:
                self._restart(param)
            warn(
                f"the model's weights are not those that the loaded state of {type(self).__name__} was saved with: "
                "their average starts anew from here. Load the model's and the optimizer's states of one checkpoint"
            )
        self._note_held()
        return not self._now.unplaced
