"""A picture of how step sizes went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def plot_rates(history: Sequence[tuple[int, Mapping[str, float]]], axes: Any = None) -> Any:
    """Draw each layer's rate over the steps, on a logarithmic scale. Needs matplotlib.

    Args:
        history: ``(step, opt.rates())`` for each step to be shown; one after each measurement is enough.
        axes: What to draw into. Default: matplotlib's current axes.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    axes = plt.gca() if axes is None else axes
    layers = list(dict.fromkeys(layer for _, rates in history for layer in rates))
    colours = plt.get_cmap("viridis")
    for number, layer in enumerate(layers):
        steps, rates = zip(*((step, rates[layer]) for step, rates in history if layer in rates), strict=True)
        colour = colours(0.9 * number / max(1, len(layers) - 1))
        axes.step(steps, rates, where="post", color=colour, linewidth=1.6, label=layer)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    return axes
