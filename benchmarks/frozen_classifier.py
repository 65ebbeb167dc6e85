"""Time and memory of a frozen classifier's loss, against the PML loss of the same formula.

A step is a forward and a backward pass to the embeddings. Each peer gets the same embeddings and the same weights:

- ``cosine``: ``FrozenClassifier(weight, kind="cosine")`` against ``NormalizedSoftmaxLoss``;
- ``arcface``: ``FrozenClassifier.from_loss(ArcFaceLoss)`` against that ``ArcFaceLoss``;
- ``linear``: ``FrozenClassifier(weight, bias)`` against ``torch.nn.functional.linear`` and ``cross_entropy``.

The peer's weights are *frozen* (``requires_grad_(False)``) or *trainable*: they receive a (C, D) gradient that nobody
steps with, which is what an old loss costs that was only left out of the optimizer. *floor* is the two bare matrix
products behind the value and the gradient, ``(E @ W.T) @ W``. *BCTLoss* is a whole step with an ``ArcFaceLoss`` of C
classes that trains, under the influence of a cosine classifier of C classes, against that ``ArcFaceLoss`` alone.

Time: the median of repeats that take turns, A B C A B C, so that a change of the machine's speed meets them all; each
is a ratio of medians in one process. Memory: the peak of what a step holds beyond what was there before it. On the CPU
it is the running sum of the allocations and frees that ``torch.profiler`` records in torch's CPU allocator (exact and
repeatable, and blind to a BLAS library's own scratch); on CUDA ``torch.cuda.max_memory_allocated``.

    python benchmarks/frozen_classifier.py --classes 10000 100000 --repeats 15 --device cpu
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from pytorch_metric_learning.losses import ArcFaceLoss, NormalizedSoftmaxLoss

from pml_compat.frozen import FrozenClassifier
from pml_compat.losses import BCTLoss

BATCH, WIDTH = 256, 512
WEIGHT_STD = 0.05  # as in a trained linear classifier
TIME_GOAL, MEMORY_GOAL = 1 / 1.8, 1 / 5  # of PML


def main(class_counts, repeats, device):
    print(f"{hardware(device)}; torch {torch.__version__}; B = {BATCH}, D = {WIDTH}; medians of {repeats} repeats.")
    print(f"Goals, FrozenClassifier / PML: time <= {TIME_GOAL:.2f} (1/1.8), memory <= {MEMORY_GOAL:.2f} (1/5).\n")
    print("| C | kind | step | ms | MiB | ours / it, time | ours / it, memory |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for classes in class_counts:
        torch.manual_seed(0)
        lengths = torch.empty(BATCH, 1, device=device).uniform_(0.9, 1.1)
        embeddings = torch.nn.functional.normalize(torch.randn(BATCH, WIDTH, device=device), dim=1) * lengths
        labels = torch.randint(classes, (BATCH,), device=device)
        weight = torch.randn(classes, WIDTH, device=device) * WEIGHT_STD
        for kind, make in (("cosine", cosine), ("arcface", arcface), ("linear", linear), ("BCT", bct)):
            steps = make(weight)
            if kind != "BCT":
                check_same_loss(kind, steps, embeddings, labels)
                steps["floor"] = (floor(weight), [])
            times = measure_times(steps, embeddings, labels, repeats)
            memory = {name: peak_memory(step, embeddings, labels) for name, step in steps.items()}
            ours = next(iter(steps))
            for name in steps:
                ratios = f"{times[ours] / times[name]:.2f} | {memory[ours] / memory[name]:.2f}"
                numbers = f"{1000 * times[name]:.1f} | {memory[name] / 2**20:.1f}"
                print(f"| {classes} | {kind} | {name} | {numbers} | {ratios} |", flush=True)


# Each returns {name: (loss of (embeddings, labels), the parameters that get a gradient)}, ours first.


def cosine(weight):
    def peer(trainable):
        return pml_peer(NormalizedSoftmaxLoss(len(weight), WIDTH, temperature=1 / 16), weight, trainable)

    return against("NormalizedSoftmaxLoss", FrozenClassifier(weight, kind="cosine", scale=16), peer)


def arcface(weight):
    def peer(trainable):
        return pml_peer(ArcFaceLoss(len(weight), WIDTH), weight, trainable)

    return against("ArcFaceLoss", FrozenClassifier.from_loss(peer(False)[0]), peer)


def linear(weight):
    bias = torch.zeros(len(weight), device=weight.device)

    def peer(trainable):
        own = weight.clone().requires_grad_(trainable)

        def loss(embeddings, labels):
            return torch.nn.functional.cross_entropy(torch.nn.functional.linear(embeddings, own, bias), labels)

        return loss, [own] if trainable else []

    return against("F.linear + cross_entropy", FrozenClassifier(weight, bias), peer)


def bct(weight):
    task, parameters = pml_peer(ArcFaceLoss(len(weight), WIDTH), weight, trainable=True)
    loss = BCTLoss(task, FrozenClassifier(weight, kind="cosine"))
    return {"BCTLoss": (loss, parameters), "its task loss alone": (task, parameters)}


def pml_peer(loss, weight, trainable):
    loss.to(weight.device).W.data.copy_(weight.t())
    loss.requires_grad_(trainable)
    return loss, [loss.W] if trainable else []


def against(name, classifier, peer):
    def ours(embeddings, labels):
        return classifier.losses(embeddings, labels)[0].mean()

    return {"FrozenClassifier": (ours, []), f"{name}, frozen": peer(False), f"{name}, trainable": peer(True)}


def floor(weight):
    def products(embeddings, labels):
        return (embeddings.detach() @ weight.t()) @ weight

    return products


def run(step, embeddings, labels):
    """One forward and backward pass, gradients made afresh; the floor has none."""
    loss_func, parameters = step
    embeddings = embeddings.detach().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    loss = loss_func(embeddings, labels)
    if loss.requires_grad:
        loss.backward()
    if embeddings.is_cuda:
        torch.cuda.synchronize()
    return loss, embeddings.grad


def check_same_loss(kind, steps, embeddings, labels):
    (loss, gradient), *peers = [run(step, embeddings, labels) for step in steps.values()]
    for peer_loss, peer_gradient in peers:
        torch.testing.assert_close(loss, peer_loss, rtol=1e-4, atol=1e-4, msg=lambda text: f"{kind} loss: {text}")
        torch.testing.assert_close(
            gradient, peer_gradient, rtol=1e-3, atol=1e-5, msg=lambda text: f"{kind} gradient: {text}"
        )


def measure_times(steps, embeddings, labels, repeats):
    seconds = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            run(step, embeddings, labels)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up


def peak_memory(step, embeddings, labels):
    """Return the bytes that a step holds at its peak, beyond what was held before it."""
    for parameter in step[1]:
        parameter.grad = None
    if embeddings.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(step, embeddings, labels)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run(step, embeddings, labels)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held, peak = 0, 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    main(arguments.classes, arguments.repeats, arguments.device)
