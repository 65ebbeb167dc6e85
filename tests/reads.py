"""What makes a program wait for the device, counted on the CPU."""

import sys
from collections import Counter
from pathlib import Path

import pytorch_metric_learning
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pml_compat

OURS, THEIRS = (str(Path(package.__file__).parent) for package in (pml_compat, pytorch_metric_learning))
MINERS = str(Path(OURS) / "miners")  # their tuples have as many rows as they find, which is counted for itself


def _whose() -> str:
    """Return whose the innermost frame of either package is: ours, a miner's of ours, or PML's."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((OURS, THEIRS)):
            return "miners" if file.startswith(MINERS) else "ours" if file.startswith(OURS) else "theirs"
        frame = frame.f_back
    return "ours"


class Reads(TorchDispatchMode):
    """Counts the values and shapes that Python is to know: all, those that our losses ask for, and our miners."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "bincount",
        "repeat_interleave",
    )

    def __init__(self):
        super().__init__()
        self.found, self.ours, self.miners, self.theirs = Counter(), Counter(), Counter(), Counter()
        self.lists = _Lists(self)

    def count(self, name):
        self.found[name] += 1
        getattr(self, _whose())[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.count(name)
        elif name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1]):
            self.count("index by a mask")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)


class _Lists(TorchFunctionMode):
    """``tolist`` and ``numpy`` of a tensor on the CPU read its memory, past the dispatcher."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy"):
            self.reads.count(name)
        return func(*args, **(kwargs or {}))
