"""What an optimizer puts onto a model that it follows, apart from what it does there.

A model takes its hooks along when it is copied or pickled. These do nothing then: nobody follows the copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

DEPTH = 2  # levels of parts that are taken for ones that may be called alone


def entries(module: nn.Module, depth: int = DEPTH) -> Iterator[nn.Module]:
    """A module and its parts that have parameters, so many levels down; lists of modules are no level."""
    yield module
    for part in module.children() if depth else ():
        if next(part.parameters(), None) is not None:
            yield from entries(part, depth if isinstance(part, (nn.ModuleList, nn.ModuleDict)) else depth - 1)


def nothing(*_: object) -> None:
    """What a copied or pickled hook does."""


class Train:
    """In front of a model's own ``train``: modes that are set here are known before the model is called."""

    def __init__(self, root: weakref.ref[nn.Module]):
        self._root = root
        self.then: list[weakref.WeakMethod[Any]] = []  # one for each optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model.train(*args, **kwargs)`` does and returns; then tell each optimizer."""
        model = self._root()
        assert model is not None  # who calls this has it
        found = type(model).train(model, *args, **kwargs)
        for ref in self.then:
            if (then := ref()) is not None:
                then(model.training)
        return found

    def __reduce__(self) -> Any:
        return (getattr, (self._root(), "train"))  # a copied or pickled model has its class's own


class Hook:
    """A method of a `Following`; on a copied or pickled model, nothing."""

    def __init__(self, call: Any):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call the method."""
        return self._call(*args)

    def __reduce__(self) -> Any:
        return (Hook, (nothing,))
