"""Build of lwas_fast. All metadata is in pyproject.toml; what must be computed or listed by hand is here."""

from setuptools import setup

setup(
    # By hand, not by discovery, which does not follow links: lwas_fast/triton_kernels is a link to the folder
    # at the top. Naming both packages makes wheels and editable installs alike find it.
    packages=["lwas_fast", "lwas_fast.triton_kernels"],
    package_data={"lwas_fast": ["py.typed"]},
)
