"""Options: what is refused, and what is said of those that earlier versions had.

Catches: a removed option that is swallowed or called unknown; one in a parameter group that goes unnoticed.
"""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS

from lwas_fast.options import RANGES, REMOVED

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)


def parameter():
    return torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize("name", REMOVED)
@EACH
def test_a_removed_option_is_told_what_became_of_it(kind, name):
    assert name not in RANGES
    value, became = REMOVED[name]
    with pytest.raises(TypeError, match=f"no option '{name}' any more: {became}. Leave it out"):
        OPTIMIZERS[kind]([parameter()], **{name: value})
    with pytest.raises(TypeError, match=f"no option '{name}' any more"):
        OPTIMIZERS[kind]([{"params": [parameter()], name: value}])


@EACH
def test_the_joint_estimator_is_gone(kind):
    with pytest.raises(TypeError, match='curvature="joint" is gone.*"blocks"'):
        OPTIMIZERS[kind]([parameter()], curvature="joint")


@EACH
def test_groups_may_carry_keys_of_the_users_own(kind):
    opt = OPTIMIZERS[kind]([{"params": [parameter()], "tag": "head"}])
    assert opt.param_groups[0]["tag"] == "head"
