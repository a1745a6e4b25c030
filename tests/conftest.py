"""What all tests share: fixed seeds, few threads, this clone in every process, no GPU tests without a GPU."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Small tensors gain nothing from many threads, and CI machines have few cores: pytest-xdist's workers take one each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
# So do the processes that tests start; a script among them finds this clone, whatever is installed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# Tests take what the installation compiled, or plain torch: none of them builds anything unless it is about that.
os.environ["LWAS_FAST_BUILD"] = "none"

# Triton's kernels run in its interpreter where there is no GPU; it reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu, with a reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Forget what a test compiled: after that every new optimizer would look for modules among all objects, 0.2 s."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo.convert_frame")) is not None:
        dynamo.FRAME_COUNTER = 0
