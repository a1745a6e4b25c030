"""Triton kernels of lwas_fast, installed as ``lwas_fast.triton_kernels``.

The folder stands at the top of the repository, beside ``csrc/``. In a wheel it is inside the package (``package_dir``
in ``setup.py``); in a clone ``lwas_fast/__init__.py`` imports it from here. Importing this package never imports
Triton, which many machines lack (macOS, PyTorch's CPU wheels): whoever needs a kernel imports its module when it is
needed.
"""

from __future__ import annotations


def triton_version() -> str | None:
    """Return the version of the installed Triton, or None where it cannot be imported.

    Triton is really imported, not just looked up: an installation whose compiled part does not load is as
    good as none.
    """
    try:
        import triton

        return str(triton.__version__)
    except Exception:  # not only ImportError: a broken driver or a missing system library raises others
        return None
