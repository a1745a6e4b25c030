"""From the loss of a step to each layer's direction and curvature.

`routes.py` has the two ways, by automatic differentiation (`products.py`) and by differences of gradients
(`differences.py`, `buffers.py`); `probes.py` the values that they fill, `explain.py` the errors. What they find, a
`Measurement`, goes on to `lwas_fast.rates`.
"""

from lwas_fast.measure.differences import Replay
from lwas_fast.measure.explain import explain, out_of_memory
from lwas_fast.measure.probes import Measurement, Probe, Products, Subject, Vectors, Window, squared_lengths
from lwas_fast.measure.replay import Call, replayed
from lwas_fast.measure.routes import Seen, again, backward, evaluate, in_passing
from lwas_fast.measure.watch import released, with_graph

__all__ = [
    "Call",
    "Measurement",
    "Probe",
    "Products",
    "Replay",
    "Seen",
    "Subject",
    "Vectors",
    "Window",
    "again",
    "backward",
    "evaluate",
    "explain",
    "in_passing",
    "out_of_memory",
    "released",
    "replayed",
    "squared_lengths",
    "with_graph",
]
