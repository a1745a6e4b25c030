"""The numbers that are kept of each layer, and those that a measurement yields, under the names they have everywhere.

In memory they are rows of tensors, so that one kernel reads and writes them; csrc/update_math.h and
triton_kernels/layer_rates.py use the same positions. In a saved state they go by name (`state.py`).
"""

from enum import IntEnum


class Column(IntEnum):
    """What a row of a bucket's table holds of a layer. Counters are exact up to 2**24."""

    AVERAGE = 0  # moving average of the closed form's step size, before bias correction
    WEIGHT = 1  # its weights' sum: 1 - beta**measurements; 0 means never measured
    DESCENT = 2  # rho of the last measurement
    CURVATURE = 3  # delta**2 of the last measurement, as sampled: before abs and L2
    APPLIED = 4  # what multiplied the direction in the last step
    REFRESHES = 5  # measurements that were taken into the rate
    NEGATIVE = 6  # measurements that met negative curvature
    NONFINITE = 7  # measurements dropped for a NaN, an infinity, or no curvature at all
    NO_DESCENT = 8  # measurements dropped because the direction does not descend
    GROWTH = 9  # measurements cut back by the limit on growth
    CAPPED = 10  # steps cut back by the cap
    SKIPPED = 11  # steps in which elements were left alone because their gradient was not finite
    LENGTH = 12  # norm of the direction, root mean square over about five steps
    SIZE = 13  # norm of the weights before the last step, not below its floor
    ELEMENTS = 14  # of the tensors that took the last step: LENGTH and SIZE are theirs
    LOSS = 15  # moving average of the loss's size at measurements, before bias correction: its weights' sum is WEIGHT


COUNTERS = tuple(c for c in Column if Column.REFRESHES <= c <= Column.SKIPPED)


class Sums(IntEnum):
    """What a measurement sums up of each tensor, and so of each layer."""

    DESCENT = 0  # -<g, d>
    CURVATURE = 1  # <d, H d> as the estimator gives it
    SQUARE = 2  # ||d||^2
