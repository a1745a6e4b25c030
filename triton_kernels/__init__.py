"""Triton kernels of lwas_fast, installed as ``lwas_fast.triton_kernels``.

The folder stands at the top of the repository, beside ``csrc/``. In a wheel it is inside the package (``package_dir``
in ``setup.py``); in a clone ``lwas_fast/__init__.py`` imports it from here. Importing this package never imports
Triton, which many machines lack (macOS, PyTorch's CPU wheels): whoever needs a kernel imports its module when it is
needed.
"""
