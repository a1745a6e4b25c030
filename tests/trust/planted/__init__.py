"""Faults to be planted: each one silent in training, none of it a crash.

A fault is a text in a file and what goes in its stead. `PYTHON` has those of the package, each with the tests of `make
test` that must find it; `CPP` those of the compiled update, of which one program has all, and `BINDINGS` those of what
hands it torch's tensors (see `test_mutants.py`).
"""

from planted import faults, measure, muon, rates, training, update
from planted.bindings import BINDINGS
from planted.compiled import CPP
from planted.fault import Fault

PYTHON = {**measure.FAULTS, **rates.FAULTS, **update.FAULTS, **training.FAULTS, **faults.FAULTS, **muon.FAULTS}

__all__ = ["BINDINGS", "CPP", "PYTHON", "Fault"]
