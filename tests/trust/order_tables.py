"""What the programs of `test_call_orders.py` draw: options, also impossible ones, and parameter groups."""

from __future__ import annotations

import torch

OPTIONS = {
    "update_every": [None, 1, 2, 3],
    "warmup_steps": [0, 2],
    "ramp_steps": [0, 3],
    "cap": [None, 0.05, float("inf")],
    "lr": [1.0, 0.5, 0.0],
    "weight_decay": [0.0, 0.1],
    "weight_decay_on": ["all", "matrices"],
    "curvature": ["signs", "blocks"],
    "hvp": ["autograd", "autograd", "finite_difference"],
    "schedule_free": [True, False],
    "maximize": [False, True],
    "seed": [0, 7],
}
OWN = {"sgd": {"momentum": [0.9, 0.0]}, "adamw": {"betas": [(0.9, 0.99), (0.0, 0.0)], "eps": [1e-8, 1e-2]}}
SET = {
    "lr": [0.3, 1.0, torch.tensor(0.7)],
    "cap": [None, 0.1],
    "weight_decay": [0.0, 0.2],
    "weight_decay_on": ["all", "matrices"],
    "update_every": [None, 1, 4],
    "ramp_steps": [0, 6],
    "warmup_rate": [1e-3, 0.01],
    "maximize": [True, False],
    "fused": [None, False],
    "foreach": [None, True],
}
INVALID = {
    "lr": [-1.0, float("nan"), "1", None],
    "cap": [0.0, -1.0, float("nan")],
    "weight_decay": [-0.1, float("inf")],
    "weight_decay_on": ["some"],
    "update_every": [0, 2.5, "2"],
    "warmup_steps": [-1],
    "ramp_steps": [-1, 1.5],
    "warmup_rate": [float("nan"), "0.1"],
    "maximize": [None],
    "momentum": [1.0, -0.1],
    "betas": [(1.0, 0.9), (0.9,), 0.9],
    "eps": [0.0, "1e-8"],
}
STYLES = ["model", "model", "named", "bare", "groups", "bare groups"]
GROUPS = {
    "a set": ("set", lambda p: {"params": {p}}),
    "no dict": ("no dict", lambda p: [p]),
    "no tensor": ("no parameter", lambda p: {"params": [1.0]}),
    "integers": ("integers", lambda p: {"params": [torch.arange(3)]}),
    "range": ("range", lambda p: {"params": [p], "lr": -1.0}),
    "whole": ("whole", lambda p: {"params": [p], "curvature": "blocks"}),
    "removed": ("removed", lambda p: {"params": [p], "damping": 0.1}),
}
