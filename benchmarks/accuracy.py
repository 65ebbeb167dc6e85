"""What cross-model retrieval metrics cost, against the matrix product that any exact search needs, and against PML.

All ranking metrics of ``CrossModelAccuracyCalculator``, on unit-length embeddings of 100 classes, beside

- ``product``: the chunked float32 matrix product of queries and gallery alone, into a buffer that is there already;
- ``PML k=None``: PML's ``AccuracyCalculator`` on the full ranking (on fewer queries: its time grows with them alone);
- ``PML k="max_bin_count"``: the same cut off at the largest class, which does not give the full mAP.

PML's nearest neighbours come from faiss. Every ratio is one of medians of repeats that take turns in one process.
Memory: the growth of the process's peak while the metrics are computed, in a process of its own. ``agreement`` is the
largest difference from scikit-learn's ``average_precision_score`` on float64 distances, averaged over 200 queries.

    pip install "pml-compat[faiss-cpu]"
    python benchmarks/accuracy.py --threads 2 --repeats 5
    python benchmarks/accuracy.py --million    # a million gallery rows, ten thousand queries
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from frozen_classifier import hardware
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import average_precision_score

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.accuracy.calculator import RANK_METRICS

CLASSES = 100
SIZES = [(10_000, 10_000, 128, 3.0), (10_000, 10_000, 512, 2.0), (1_000, 100_000, 128, 2.0)]
PML_METRICS = ("precision_at_1", "mean_average_precision", "mean_average_precision_at_r", "r_precision")


def data(queries, gallery, width):
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (queries,)), torch.randint(CLASSES, (gallery,))
    centers = torch.randn(CLASSES, width)
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
    out = torch.empty(256, len(reference))

    def run():
        for part in query.split(256):
            torch.mm(part, reference.t(), out=out[: len(part)])

    return run


def main(threads, repeats):
    torch.set_num_threads(threads)
    print(f"{hardware('cpu')}, {threads} used; torch {torch.__version__}; medians of {repeats} repeats.\n")
    print(
        "| queries x gallery x width | product, s | all metrics, s | metrics / product | goal | extra MiB | agreement |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    calculator = CrossModelAccuracyCalculator(include=RANK_METRICS, device="cpu")
    for queries, gallery, width, goal in SIZES:
        arrays = data(queries, gallery, width)
        found = medians(
            {"product": product(arrays[0], arrays[2]), "metrics": lambda a=arrays: calculator.get_accuracy(*a)}, repeats
        )
        ratio = found["metrics"] / found["product"]
        sizes = f"{queries} x {gallery} x {width}"
        print(
            f"| {sizes} | {found['product']:.3f} | {found['metrics']:.3f} | {ratio:.2f} | {goal} "
            f"| {extra_memory(arrays, threads):.0f} | {agreement(arrays):.1g} |",
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
    calculator.get_accuracy(*data(300, 3000, 128))  # what is loaded and started once
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


def million():
    query, query_labels, reference, reference_labels = data(10_000, 1_000_000, 128)
    start = time.perf_counter()
    accuracy = CrossModelAccuracyCalculator(include=RANK_METRICS, device="cpu").get_accuracy(
        query, query_labels, reference, reference_labels
    )
    print(f"{time.perf_counter() - start:.0f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--memory", metavar="FOLDER", help="print the extra MiB for the arrays in a folder")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory, arguments.threads)
    elif arguments.million:
        million()
    else:
        main(arguments.threads, arguments.repeats)
