"""Faults in MuonLW's direction, the length of its steps, and what its states are checked for."""

from __future__ import annotations

from planted.fault import Fault, exact

REFERENCE = exact("muon-defaults", "muon-momentum", "muon-every_step")
OWN, ORTHOGONAL = ("test_muon.py",), ("test_orthogonal.py",)

FAULTS: dict[str, Fault] = {
    "persistence is not of the weights' norm": Fault(
        "muon.py", "beta**4 * (1 - beta)", "beta**2 * (1 - beta)", (*OWN, *REFERENCE)
    ),
    "steps are as long as if directions were independent": Fault(
        "update/control.py", "ramp *= 1.0 if warming else rule.persistence(group)", "pass", (*OWN, *REFERENCE)
    ),
    "a measurement goes along the momentum before": Fault(
        "muon.py",
        '        momenta = list(torch._foreach_lerp(momenta, here.gradients, 1 - group["betas"][1]))\n',
        "",
        REFERENCE,
    ),
    "elements that are not finite spoil the momentum": Fault(
        "muon.py", "gradients = moving.taking_part(moving.gradients, momenta)", "gradients = moving.gradients", OWN
    ),
    "nothing looks ahead": Fault(
        "muon.py", 'list(momenta), group["betas"][1]))', "list(momenta), 0.0))", (*OWN, *REFERENCE)
    ),
    "directions have one length": Fault(
        "muon.py", "torch._foreach_mul_(directions, sizes)", "pass", (*OWN, *REFERENCE)
    ),
    "the size of gradients is biased to its start": Fault(
        "muon.py",
        "        torch._foreach_mul_(sizes, each(bias_correction(moving.steps, MEMORY) ** 0.5, sizes))\n",
        "",
        (*OWN, *REFERENCE),
    ),
    "a skipped step counts for the size of gradients": Fault("muon.py", "torch.where(n > 0, new, old)", "new", OWN),
    "the size of gradients is not remembered": Fault("muon.py", "torch._foreach_copy_(known, squares)", "pass", OWN),
    "decay counts as curvature": Fault(
        "muon.py", "decoupled = whole = True", "decoupled, whole = False, True", exact("muon-weight_decay")
    ),
    "shards are orthogonalized each by itself": Fault(
        "muon.py", "decoupled = whole = True", "decoupled = True", ("parallel/test_fsdp_use.py",)
    ),
    "a mean square keeps its dtype when its parameter is cast": Fault("layers.py", ", *self._scalars}", "}", OWN),
    "four rounds": Fault("orthogonal.py", "ROUNDS = 5", "ROUNDS = 4", ORTHOGONAL),
    "squares of small elements are lost": Fault(
        "orthogonal.py",
        "        matrices /= torch.stack([sizes[i] for i in members]).view(-1, 1, 1)\n",
        "",
        ORTHOGONAL,
    ),
    "gradients are written to": Fault(
        "orthogonal.py",
        "vector = tensor / sizes[i]",
        "vector = tensor.div_(sizes[i])",
        ORTHOGONAL,
    ),
    "tall matrices come back on their side": Fault(
        "orthogonal.py", "(result if m.shape[1] == columns else result.T)", "result", ORTHOGONAL
    ),
    "root mean squares are norms": Fault("orthogonal.py", "math.sqrt(max(1, tensor.numel()))", "1", ORTHOGONAL),
    "a wide matrix takes a round less": Fault(
        "orthogonal.py", "(*factors, matrices)", "(*factors[1:], matrices)", ORTHOGONAL
    ),
    "AdamWLW's state is taken for MuonLW's": Fault(
        "fits.py", '_OWN = ("betas", "momentum", "eps")', '_OWN = ("betas", "momentum")', OWN
    ),
    "a saved mean square is not checked": Fault(
        "fits.py", '(what in ("step", *rule.scalars) and low < 0)', '(what == "step" and low < 0)', OWN
    ),
}
