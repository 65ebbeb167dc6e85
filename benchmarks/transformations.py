"""What carrying a stored gallery over costs, against its own matrix products and against 1x1 convolutions.

FCT's transformation, 128/128/128 with 2048 hidden features (5,712,000 parameters), in batches of several sizes:

- ``apply``: as ``transformation.apply_to`` runs it, from one array into another;
- ``products``: its matrix products alone, into buffers that are there already;
- ``convolutions``: the same network as the public code writes it, 1x1 convolutions on 4-D tensors, eval mode.

Then a linear map, 512 to 512, over a memory map of a million rows, against its matrix products alone on rows that are
in memory, and against a plain loop over the memory map in NumPy (whose products may be faster or slower than torch's).

Every ratio is one of medians of repeats that take turns in one process.

    python benchmarks/transformations.py --repeats 7
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from frozen_classifier import hardware

from pml_compat.transformations import FCTTransformation, LinearTransformation

WIDTH, HIDDEN = 128, 2048
PRODUCTS_GOAL, CONVOLUTIONS_GOAL, MAP_GOAL = 1.05, 1.6, 1.15


def convolutional(transformation):
    """Return ``transformation`` as a network of 1x1 convolutions, with its weights and statistics."""

    def layers(sequential):
        out = []
        for layer in sequential:
            if isinstance(layer, torch.nn.Linear):
                made = torch.nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
                made.weight.copy_(layer.weight[:, :, None, None])
                if layer.bias is not None:
                    made.bias.copy_(layer.bias)
            elif isinstance(layer, torch.nn.BatchNorm1d):
                made = torch.nn.BatchNorm2d(layer.num_features)
                made.load_state_dict(layer.state_dict())
            else:
                made = torch.nn.ReLU(inplace=True)
            out.append(made)
        return torch.nn.Sequential(*out).eval()

    with torch.no_grad():
        old, side, mix = (
            layers(part) for part in (transformation.old_branch, transformation.side_branch, transformation.mix)
        )

    def run(embeddings, side_info):
        parts = [old(embeddings[:, :, None, None]), side(side_info[:, :, None, None])]
        return mix(torch.cat(parts, dim=1))[:, :, 0, 0]

    return run


def products(transformation, batch_size):
    """Return the matrix products of ``transformation``, as a function of nothing."""
    parts = (transformation.old_branch, transformation.side_branch, transformation.mix)
    weights = [layer.weight.detach().t() for part in parts for layer in part if isinstance(layer, torch.nn.Linear)]
    inputs = {width: torch.randn(batch_size, width) for width in {len(weight) for weight in weights}}
    outputs = {weight.shape[1]: torch.empty(batch_size, weight.shape[1]) for weight in weights}

    def run():
        for weight in weights:
            torch.mm(inputs[len(weight)], weight, out=outputs[weight.shape[1]])

    return run


def medians(runs, repeats):
    """Return the median seconds of every run; they take turns."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def fct(batch_sizes, rows, repeats):
    print(
        f"FCT, {rows} rows; goals: at most {PRODUCTS_GOAL} x products, at least {CONVOLUTIONS_GOAL} x convolutions.\n"
    )
    print("| batch | apply, us a row | apply / products | convolutions / apply |\n|---:|---:|---:|---:|")
    transformation = FCTTransformation(WIDTH, WIDTH, WIDTH, HIDDEN).eval()
    source, side = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
    convolutions = convolutional(transformation)
    torch.testing.assert_close(convolutions(source[:9], side[:9]), transformation(source[:9], side[:9]))
    for batch_size in batch_sizes:
        alone = products(transformation, batch_size)
        batches = rows // batch_size
        found = medians(
            {
                "apply": lambda size=batch_size, n=batches * batch_size: transformation.apply_to(
                    source[:n], side[:n], batch_size=size, progress=False
                ),
                "products": lambda run=alone, n=batches: [run() for _ in range(n)],
                "convolutions": lambda size=batch_size, n=batches * batch_size: [
                    convolutions(a, b) for a, b in zip(source[:n].split(size), side[:n].split(size), strict=True)
                ],
            },
            repeats,
        )
        print(
            f"| {batch_size} | {1e6 * found['apply'] / (batches * batch_size):.2f} "
            f"| {found['apply'] / found['products']:.2f} | {found['convolutions'] / found['apply']:.2f} |",
            flush=True,
        )


def linear_map(rows, width, repeats):
    print(f"\nA linear map over a memory map, {rows} x {width} float32; goal: at most {MAP_GOAL} x its products.\n")
    transformation = LinearTransformation(width, width, bias=False)
    weight = transformation.linear.weight.detach().numpy().T
    size = 8192
    with tempfile.TemporaryDirectory() as folder:
        source_file, out, plain = (Path(folder) / name for name in ("source.npy", "out.npy", "plain.npy"))
        source = np.lib.format.open_memmap(source_file, "w+", np.float32, (rows, width))
        rng = np.random.default_rng(0)
        for start in range(0, rows, size):
            source[start : start + size] = rng.standard_normal((min(size, rows - start), width), np.float32)
        source = np.load(source_file, mmap_mode="r")
        block, result, matrix = (
            torch.from_numpy(source[:size].copy()),
            torch.empty(size, width),
            torch.from_numpy(weight),
        )

        def by_numpy():
            target = np.lib.format.open_memmap(plain, "w+", np.float32, (rows, width))
            for start in range(0, rows, size):
                np.matmul(source[start : start + size], weight, out=target[start : start + size])

        ready = np.zeros((rows, width), np.float32)

        found = medians(
            {
                "products": lambda: [torch.mm(block, matrix, out=result) for _ in range(0, rows, size)],
                "memory map into a file, plain NumPy": by_numpy,
                "memory map into a file, apply": lambda: transformation.apply_to(
                    source, out=out, batch_size=size, progress=False
                ),
                "memory map into new memory, apply": lambda: transformation.apply_to(source, progress=False),
                "memory map into memory, apply": lambda: transformation.apply_to(source, out=ready, progress=False),
            },
            repeats,
        )
        np.testing.assert_allclose(np.load(out, mmap_mode="r")[-5:], np.load(plain, mmap_mode="r")[-5:], atol=1e-5)
    print("| what | s | / products |\n|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / found['products']:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--rows", type=int, default=16_384, help="of FCT")
    parser.add_argument("--map-rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{hardware('cpu')}; torch {torch.__version__}; medians of {arguments.repeats} repeats.\n")
    fct(arguments.batches, arguments.rows, arguments.repeats)
    linear_map(arguments.map_rows, 512, max(3, arguments.repeats // 2))
