"""What a planted fault is."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault in the package.

    Attributes:
        file: In lwas_fast/, but for what begins with "../".
        right: Stands there once.
        wrong: What goes in its stead.
        tests: Node ids below tests/, of tests of which one must fail.
        needs: What these skip without: ``"extension"`` or ``"triton"``.
    """

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    needs: str | None = None


def exact(*rows: str) -> tuple[str, ...]:
    """Rows of the float64 comparison with the reference, such as ``"sgd-defaults"``."""
    return tuple(f"test_against_reference.py::test_float64_agrees_to_rounding[{row}]" for row in rows)


BOTH = ("sgd-defaults", "adamw-defaults")
