"""What cross-model retrieval metrics cost, against the matrix product that any exact search needs, and against PML.

All ranking metrics of ``CrossModelAccuracyCalculator``, or precision at 1 alone, on unit-length embeddings, beside

- ``product``: the chunked float32 matrix product of queries and gallery alone, into a buffer that is there already;
- ``PML k=None``: PML's ``AccuracyCalculator`` on the full ranking (on fewer queries: its time grows with them alone);
- ``PML k="max_bin_count"``: the same cut off at the largest class, which does not give the full mAP.

PML's nearest neighbours come from faiss. Every ratio is one of medians of repeats that take turns in one process.
Memory: the growth of the process's peak while the metrics are computed, in a process of its own. ``agreement`` is the
largest difference from scikit-learn's ``average_precision_score`` on float64 distances, averaged over 200 queries.
``--steps`` measures ``evaluate`` with an old, a transformed and a new gallery, beside the same with a ranking at every
step of the backfill. Where numba is missing, or with ``--torch``, torch's path is measured.

    pip install "pml-compat[faiss-cpu,fast]"
    python benchmarks/accuracy.py --threads 2 --repeats 5
    python benchmarks/accuracy.py --steps
    python benchmarks/accuracy.py --passes     # of the path for GPUs
    python benchmarks/accuracy.py --million    # a million gallery rows, ten thousand queries
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import torch
from frozen_classifier import hardware
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import average_precision_score
from torch.utils._python_dispatch import TorchDispatchMode

from pml_compat.accuracy import CrossModelAccuracyCalculator, compiled, mixed_accuracy, ranking
from pml_compat.accuracy.calculator import RANK_METRICS
from pml_compat.upgrade import evaluate

FIRST = ("precision_at_1",)
CASES = [  # metrics, queries, gallery, width, classes, goal
    ("all", 10_000, 10_000, 128, 100, 2.2),
    ("all", 10_000, 10_000, 512, 100, 1.5),
    ("all", 1_000, 100_000, 128, 1000, 2.0),
    ("all", 1_000, 100_000, 128, 100, 2.5),
    ("P@1", 10_000, 10_000, 128, 100, 1.3),
]
MILLION_GOAL = 3.5
PML_METRICS = ("precision_at_1", "mean_average_precision", "mean_average_precision_at_r", "r_precision")


def data(queries, gallery, width, classes=100):
    torch.manual_seed(0)
    labels = torch.randint(classes, (queries,)), torch.randint(classes, (gallery,))
    centers = torch.randn(classes, width)
    rows = (torch.nn.functional.normalize(centers[y] * 0.5 + torch.randn(len(y), width), dim=1) for y in labels)
    query, reference = rows
    return query, labels[0], reference, labels[1]


def medians(runs, repeats):
    """Return the median seconds of every run; they take turns."""
    times = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def product(query, reference):
    """The plainest tiles: 256 queries by at most 16,384 gallery rows, into one buffer."""
    out = torch.empty(256 * min(len(reference), 16_384))

    def run():
        for part in query.split(256):
            for rows in reference.split(16_384):
                torch.mm(part, rows.t(), out=out[: len(part) * len(rows)].view(len(part), -1))

    return run


def main(threads, repeats):
    torch.set_num_threads(threads)
    engine = "torch" if compiled.kernels() is None else "compiled loops"
    print(f"{hardware('cpu')}, {threads} used; torch {torch.__version__}; {engine}; medians of {repeats} repeats.\n")
    print("| metrics | queries x gallery x width, classes | product, s | s | s / product | goal | MiB | agreement |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for metrics, queries, gallery, width, classes, goal in CASES:
        calculator = CrossModelAccuracyCalculator(include=FIRST if metrics == "P@1" else RANK_METRICS, device="cpu")
        arrays = data(queries, gallery, width, classes)
        found = medians(
            {
                "product": product(arrays[0], arrays[2]),
                "metrics": lambda a=arrays, c=calculator: c.get_accuracy(*a),
            },
            repeats,
        )
        bare, ours = found["product"], found["metrics"]
        print(
            f"| {metrics} | {queries} x {gallery} x {width}, {classes} | {bare:.3f} | {ours:.3f} | {ours / bare:.2f} "
            f"| {goal} | {extra_memory(arrays, threads):.0f} | {agreement(arrays):.1g} |",
            flush=True,
        )
    pml(repeats)


def pml(repeats):
    query, query_labels, reference, reference_labels = data(10_000, 10_000, 128)
    few = 500
    ours = CrossModelAccuracyCalculator(include=PML_METRICS, device="cpu")
    full = AccuracyCalculator(include=PML_METRICS, k=None, device=torch.device("cpu"))
    cut = AccuracyCalculator(include=PML_METRICS, k="max_bin_count", device=torch.device("cpu"))
    found = medians(
        {
            "ours": lambda: ours.get_accuracy(query, query_labels, reference, reference_labels),
            "PML k=None, a twentieth": lambda: full.get_accuracy(
                query[:few], query_labels[:few], reference, reference_labels
            ),
            'PML k="max_bin_count"': lambda: cut.get_accuracy(query, query_labels, reference, reference_labels),
        },
        max(1, repeats // 2),
    )
    found["PML k=None"] = found.pop("PML k=None, a twentieth") * len(query) / few
    print("\n| 10000 x 10000 x 128 | s | / ours |\n|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / found['ours']:.2f} |", flush=True)


def agreement(arrays):
    query, query_labels, reference, reference_labels = (
        array[:200] if i < 2 else array for i, array in enumerate(arrays)
    )
    got = CrossModelAccuracyCalculator(include=("mean_average_precision",), device="cpu").get_accuracy(
        query, query_labels, reference, reference_labels
    )["mean_average_precision"]
    scores = -torch.cdist(query.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = [
        average_precision_score((reference_labels == label).numpy(), row.numpy())
        for label, row in zip(query_labels, scores, strict=True)
    ]
    return abs(got - statistics.fmean(expected))


def extra_memory(arrays, threads):
    """Return the growth of the peak in MiB, measured in a process of its own that loads the arrays and no more."""
    with tempfile.TemporaryDirectory() as folder:
        for number, array in enumerate(arrays):
            np.save(f"{folder}/{number}.npy", array.numpy())
        command = [sys.executable, __file__, "--memory", folder, "--threads", str(threads)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(folder, threads):
    torch.set_num_threads(threads)
    calculator = CrossModelAccuracyCalculator(include=RANK_METRICS, device="cpu")
    calculator.get_accuracy(*data(500, 10_000, 128))  # what is loaded and started once
    arrays = [torch.from_numpy(np.load(f"{folder}/{number}.npy")) for number in range(4)]
    held = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:  # sets the peak back to what is held now
        file.write("5")
    calculator.get_accuracy(*arrays)
    print((status("VmHWM") - held) / 1024)


def status(name):
    """Return an entry of this process's status in KiB."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])


def steps(repeats):
    query, query_labels, new, labels = data(2_000, 10_000, 128)
    old, mapped = (torch.nn.functional.normalize(new + noise * torch.randn(new.shape), dim=1) for noise in (0.1, 0.05))
    given = {"old_queries": query.roll(1, 1), "new_gallery": new, "transformed_gallery": mapped}

    def run(can_mix):
        def timed():
            mixed_accuracy.can_mix = can_mix
            evaluate(query, old, query_labels, labels, **given)

        return timed

    found = medians(
        {"two products": run(mixed_accuracy.can_mix), "a ranking at every step": run(lambda *_: False)}, repeats
    )
    print("| evaluate, 2000 x 10000 x 128, two galleries to backfill, five orders | s |\n|---|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} |")


def million():
    query, query_labels, reference, reference_labels = data(10_000, 1_000_000, 128)
    few = query[:2560]
    multiply = product(few, reference)
    multiply()
    start = time.perf_counter()
    multiply()
    products = (time.perf_counter() - start) * len(query) / len(few)
    start = time.perf_counter()
    accuracy = CrossModelAccuracyCalculator(include=RANK_METRICS, device="cpu").get_accuracy(
        query, query_labels, reference, reference_labels
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seconds:.0f} s, {seconds / products:.2f} x the product (goal {MILLION_GOAL}), {peak:.2f} GiB")
    print(accuracy)


class Passes(TorchDispatchMode):
    """Counts operations on tensors of so many numbers or more, and those that make the host wait for a GPU."""

    def __init__(self, size):
        super().__init__()
        self.size, self.passes, self.waits = size, Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        name = function.__name__.split(".")[0]
        tensors = [one for one in (*arguments, out) if isinstance(one, torch.Tensor)]
        if not function.is_view and name not in VIEWS and any(one.numel() >= self.size for one in tensors):
            self.passes[name] += 1
        if name in WAITS or (name.startswith("index") and any(is_mask(one) for one in arguments)):
            self.waits[name] += 1
        return out


VIEWS = ("detach", "empty", "new_empty", "t", "slice", "split", "view", "_unsafe_view", "expand", "unsqueeze")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2")


def is_mask(indices):
    return isinstance(indices, list | tuple) and any(
        isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices
    )


def passes():
    """Count what torch's path would have a GPU do for one chunk of queries."""
    ranking._sort_values = lambda matrix: matrix.sort(dim=1).values  # as on a GPU
    compiled.kernels = lambda: None
    gallery, chunk = 40_960, ranking._COUNTED_ELEMENTS // 40_960
    found = []
    for chunks in (1, 2):
        arrays = data(chunks * ranking._CHUNK_ELEMENTS // gallery, gallery, 128)
        calculator = CrossModelAccuracyCalculator(include=RANK_METRICS, device="cpu")
        with Passes(chunk * gallery) as counted:
            calculator.get_accuracy(*arrays)
        found.append((counted.passes, counted.waits))
    (passes_1, waits_1), (passes_2, waits_2) = found
    print("of a chunk of 16 MiB of scores, counted in 4 parts:")
    print("passes over scores:", dict(passes_2 - passes_1))
    print("waits of the host:", dict(waits_2 - waits_1), "and once:", dict(waits_1 - (waits_2 - waits_1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--passes", action="store_true", help="count what torch's path does")
    parser.add_argument("--torch", action="store_true", help="without compiled loops")
    parser.add_argument("--memory", metavar="FOLDER", help="print the extra MiB for the arrays in a folder")
    arguments = parser.parse_args()
    if arguments.torch:
        compiled.kernels = lambda: None
    if arguments.memory:
        print_memory(arguments.memory, arguments.threads)
    elif arguments.passes:
        passes()
    elif arguments.steps:
        torch.set_num_threads(arguments.threads)
        steps(arguments.repeats)
    elif arguments.million:
        torch.set_num_threads(arguments.threads)
        million()
    else:
        main(arguments.threads, arguments.repeats)
