"""Build of lwas_fast: what must be computed, above all which extension can be compiled now.

``LWAS_FAST_BUILD`` says what to compile: ``auto`` (default) what the machine can, ``cuda``, ``cpu`` or ``none``. It is
compiled for the torch that is found here, which takes ``--no-build-isolation``. Where that is not the one that runs, or
none, the package compiles at first use (lwas_fast/update/first_use.py). All metadata is in pyproject.toml.
"""

import runpy
import sys
from types import SimpleNamespace

from setuptools import __version__ as setuptools_version
from setuptools import find_packages, setup

toolchain = SimpleNamespace(**runpy.run_path("lwas_fast/update/toolchain.py"))  # not imported: the package needs torch


def say(text: str) -> None:
    """Print a line that pip shows with -v, and that a build log keeps."""
    print(f"lwas_fast: {text}", file=sys.stderr)


def extension() -> dict:
    """What setup() needs to build the extension that fits, or nothing.

    Raises:
        SystemExit: LWAS_FAST_BUILD asks for what cannot be had; says what is missing.
    """
    try:
        choice = toolchain.wanted()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if choice == "none":
        say("nothing is compiled now, as LWAS_FAST_BUILD=none says")
        return {}

    def without(reason: str) -> dict:
        if choice != "auto":
            raise SystemExit(f"LWAS_FAST_BUILD={choice}, but {reason}")
        say(f"nothing is compiled now: {reason}. It is tried again at first use; until then plain torch serves")
        return {}

    try:
        import torch
    except ImportError as error:
        return without(f"torch cannot be imported here ({error}); with --no-build-isolation it could be")
    if reason := toolchain.why_no_compiler():
        return without(reason)
    no_cuda = "LWAS_FAST_BUILD=cpu" if choice == "cpu" else toolchain.why_no_cuda(torch)
    if no_cuda and choice == "cuda":
        return without(no_cuda)
    say(f"compiled update for {f'the CPU ({no_cuda})' if no_cuda else 'CPU and CUDA'}")
    name = "lwas_fast." + toolchain.module_name(torch.__version__)
    module = toolchain.extension(name, None if no_cuda else toolchain.architectures(torch))
    module.optional = choice == "auto"

    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """torch's, which goes on with less where the build was only tried: for the CPU alone, then without."""

        def build_extensions(self) -> None:
            # Only setuptools looks at `optional`, and would hide a failure from what follows here.
            module.optional = False
            try:
                super().build_extensions()
            except Exception as error:  # torch raises of many kinds
                if choice != "auto":
                    raise
                if module.define_macros:
                    say(f"the build with CUDA failed ({error}); once more, for the CPU alone")
                    vars(module).update(vars(toolchain.extension(name, None)))
                    self.build_extensions()
                else:
                    say(f"nothing was compiled: the build failed ({error}). It is tried again at first use")
            finally:
                module.optional = choice == "auto"

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


# Without build isolation nobody reads what pyproject.toml asks for, and an older setuptools fails obscurely.
if int(setuptools_version.split(".")[0]) < 77:
    raise SystemExit(
        f"lwas_fast is built with setuptools >= 77, and this is {setuptools_version}: pip install 'setuptools>=77'"
    )

setup(
    # The kernels and the C++ code (MANIFEST.in has it) stand beside the package, and are installed inside it.
    packages=[*find_packages(include=["lwas_fast", "lwas_fast.*"]), "lwas_fast.triton_kernels", "lwas_fast.csrc"],
    package_dir={"lwas_fast.triton_kernels": "triton_kernels", "lwas_fast.csrc": "csrc"},
    package_data={"lwas_fast": ["py.typed"]},
    **extension(),
)
