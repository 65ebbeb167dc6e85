"""What a blended query costs beside its product with the rotation: a server's one query, and 64 together.

    python benchmarks/query_blend.py

Medians of five turns each, in microseconds a query.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pml_compat.serving import NumpyQueryBlend, QueryBlend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    old = torch.randn(4000, options.width)
    new = old @ torch.linalg.qr(torch.randn(options.width, options.width))[0] + 0.1 * torch.randn_like(old)
    blend = QueryBlend().fit(old, new, torch.arange(4000) % 40)
    blend.share = 0.3
    with tempfile.TemporaryDirectory() as folder:
        blend.save(Path(folder) / "blend.safetensors")
        server = NumpyQueryBlend(Path(folder) / "blend.safetensors")
    for count in (1, 64):
        u, v = old[:count].contiguous(), new[:count].contiguous()
        u_array, v_array = u.numpy(), v.numpy()
        kinds: dict[str, Callable[[], object]] = {
            "product, torch": lambda v=v: v @ blend.rotation,
            "blend, torch": lambda u=u, v=v: blend.query_rows(u, v),
            "product, NumPy": lambda v=v_array: v @ server.rotation,
            "blend, NumPy": lambda u=u_array, v=v_array: server(u, v),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(5):  # each kind by itself for a while, its rotation in the caches as a server's is
            for name, run in kinds.items():
                for _ in range(options.repeats):
                    start = time.perf_counter()
                    run()
                    times[name].append(1e6 * (time.perf_counter() - start) / count)
        medians = ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in times.items())
        print(f"{count} at once, width {options.width}: {medians}")


if __name__ == "__main__":
    main()
