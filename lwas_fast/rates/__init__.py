"""From a measurement to each layer's rate: closed form, averages over measurements, guards.

`refresh.py` takes in a measurement by the implementation that serves: `closed_form.py` in plain torch, `launch.py` in
one Triton launch for all layers of a device. `when.py` says when to measure and how long to remember. The new rows of
statistics, `Measured`, are entered by the optimizer's next step.
"""

from lwas_fast.rates.closed_form import current
from lwas_fast.rates.launch import Plans
from lwas_fast.rates.refresh import Measured, Outcome, of_this_step, refreshed, take_in
from lwas_fast.rates.when import is_due, overdue, postpone

__all__ = [
    "Measured",
    "Outcome",
    "Plans",
    "current",
    "is_due",
    "of_this_step",
    "overdue",
    "postpone",
    "refreshed",
    "take_in",
]
