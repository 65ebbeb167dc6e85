"""What TAR@FAR over all pairs costs, against the matrix products alone.

Rows of unit length around class centres, every row a query and a gallery item:

- ``products``: the float32 matrix product of queries and gallery in chunks, into one buffer;
- ``verification``: TAR, threshold and FAR reached, at a FAR low or high, at several, and at a threshold carried over.

Times are medians of repeats that take turns in one process. Memory is the growth of the peak resident set beyond the
inputs, of one call in a fresh process.

    python benchmarks/verification.py --repeats 7
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from frozen_classifier import hardware

from pml_compat.verification import verification

TIME_GOAL, MEMORY_GOAL = 2.5, 150  # of the products; MiB
CHUNK = 512
CALLS = {
    "far 1e-3": {"fars": 1e-3},
    "far 1e-4, 1e-3, 1e-2": {"fars": (1e-4, 1e-3, 1e-2)},
    "far 1e-3 and a threshold": {"fars": 1e-3, "thresholds": [0.3]},
    "far 0.1": {"fars": 0.1},
}


def data(rows, width, classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator)
    centers = torch.randn(classes, width, generator=generator)
    embeddings = (centers[labels] + 1.5 * torch.randn(rows, width, generator=generator) for _ in range(2))
    return [torch.nn.functional.normalize(matrix, dim=1) for matrix in embeddings], labels


def products(query, reference):
    buffer = torch.empty(CHUNK, len(reference))
    for start in range(0, len(query), CHUNK):
        part = query[start : start + CHUNK]
        torch.mm(part, reference.t(), out=buffer[: len(part)])


def measure(arguments):
    (query, reference), labels = data(arguments.rows, arguments.width, arguments.classes)
    runs = {"products": lambda: products(query, reference)} | {
        name: lambda options=options: verification(query, labels, reference, labels, ref_includes_query=True, **options)
        for name, options in CALLS.items()
    }
    times = {name: [] for name in runs}
    for turn in range(arguments.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_peak_memory(arguments):
    """Print the MiB by which one call raises the peak resident set, the libraries having been warmed up; on Linux."""
    (query, reference), labels = data(arguments.rows, arguments.width, arguments.classes)
    few = slice(0, 1000)
    for options in ({"fars": 1e-3}, {"fars": 1.0}):
        verification(query[few], labels[few], reference[few], labels[few], ref_includes_query=True, **options)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory_status("VmRSS")
    verification(query, labels, reference, labels, ref_includes_query=True, **CALLS[arguments.memory_of])
    print((memory_status("VmHWM") - before) / 1024)


def memory_status(name):
    """Return a line of the kernel's account of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main(arguments):
    shape = f"{arguments.rows} x {arguments.rows}, D = {arguments.width}, {arguments.classes} labels"
    print(f"{hardware('cpu')}; torch {torch.__version__}; {shape}; medians of {arguments.repeats} repeats.")
    print(f"Goals: time <= {TIME_GOAL} x the products, memory <= {MEMORY_GOAL} MiB beyond the inputs.\n")
    times = measure(arguments)
    print("| what | s | / products | MiB |\n|---|---:|---:|---:|", flush=True)
    for name, seconds in times.items():
        memory = ""
        if name in CALLS:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
            memory = f"{float(subprocess.run(command, capture_output=True, text=True, check=True).stdout):.0f}"
        print(f"| {name} | {seconds:.2f} | {seconds / times['products']:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", choices=list(CALLS), help="only print the MiB of one call")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_peak_memory(arguments)
    else:
        main(arguments)
