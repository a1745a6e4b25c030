"""Faults in what is there for faults: interrupts, memory that runs out, closures that draw, threads, files."""

from __future__ import annotations

from planted.fault import Fault

WHOLE = ("trust/test_faults.py::test_out_of_memory_changes_nothing",)
CLOSURES = ("trust/test_closures.py",)

FAULTS: dict[str, Fault] = {
    "signals do not wait": Fault(
        "interrupts.py",
        "                _waiting[number] = handler\n                _signal.signal(number, _note)\n",
        "                _waiting[number] = handler\n",
        ("test_signals.py",),
    ),
    "a signal that waited is lost": Fault("interrupts.py", "handler(number, frame)", "pass", ("test_signals.py",)),
    "handlers stay exchanged where one of them raises": Fault(
        "interrupts.py",
        "        if _waiting or _came:\n            _let_go()\n",
        "        pass\n",
        ("test_signals.py",),
    ),
    "a step is interrupted half-way": Fault(
        "optimizer.py", "with whole(), torch.no_grad():", "with torch.no_grad():", ("trust/test_interrupts.py",)
    ),
    "weights stay swapped by half when memory runs out": Fault(
        "update/average.py",
        "            _swap(rule, group, state[param], param, not mode)\n",
        "            pass\n",
        WHOLE,
    ),
    "a state stays loaded by half when memory runs out": Fault(
        "optimizer.py", "self.state, self.param_groups = before", "pass", WHOLE
    ),
    "out of memory costs the step": Fault(
        "measure/explain.py",
        "        return True\n",
        "        return False\n",
        ("trust/test_faults.py::test_out_of_memory_in_a_curvature_pass",),
    ),
    "out of memory is tried again at each step": Fault(
        "optimizer.py",
        "rates.postpone(self.param_groups)",
        "pass",
        ("trust/test_faults.py::test_measurements_that_lack_memory_keep_their_intervals",),
    ),
    "numpy's and Python's random numbers are not drawn again": Fault(
        "measure/differences.py", "_set_others(self._others)", "pass", CLOSURES
    ),
    "the user's random numbers go on from where they were drawn again": Fault(
        "measure/differences.py", "_set_others(now)", "pass", CLOSURES
    ),
    "gradients of two batches pass for curvature": Fault(
        "measure/differences.py", "or apart > _NOISE * whole", "", CLOSURES
    ),
    "torch's random numbers go on from where they were drawn again": Fault(
        "measure/differences.py", "with torch.random.fork_rng(devices=self._gpus):", "if True:", CLOSURES
    ),
    "buffers of other threads' modules are put back": Fault(
        "measure/buffers.py", " and threading.get_ident() == self._thread", "", CLOSURES
    ),
    "sums over layers depend on threads": Fault(
        "rates/closed_form.py", "_PIECE = 2**15", "_PIECE = 2**17", ("trust/test_determinism.py",)
    ),
    "what a run found out is not saved": Fault(
        "weights.py", "            group |= self._learned()\n", "", ("trust/test_resume.py",)
    ),
    "options set in mid-training are not checked": Fault(
        "optimizer.py",
        "                self._now.checked.check(self.param_groups)\n                self._update()\n",
        "                self._update()\n",
        ("test_options.py",),
    ),
    "a state keeps its dtype when its parameter is cast": Fault(
        "layers.py",
        "entry[what] = entry[what].to(param.device, state_dtype(param))",
        "pass",
        ("trust/test_hard_input.py::test_events_in_training",),
    ),
}
