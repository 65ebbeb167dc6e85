"""Time and memory of RACTLoss, against lean masked matrices and against PML's NTXentLoss on the same pairs.

A step is a forward and a backward pass to the new embeddings, D = 512, four samples a label. The peers:

- ``masked matrices``: the same formula in a few lines of torch, nothing checked, no reducer: two matrix products, a
  mask, and a cross-entropy or a hinge;
- ``NTXentLoss``, contrastive form alone: given every positive and every negative pair as ``indices_tuple``. It compares
  each positive pair with each negative one, so that its time and memory grow with the cube of the batch. It is
  measured at the largest of the batch sizes whose tensors, B * 2 B * B numbers each, stay below ``--ntxent-gib``, and
  nowhere else.

Losses and gradients of the peers are compared first. Every time is a median of repeats that take turns in one process.
Memory: what a step holds at its peak beyond what was there before it (see ``frozen_classifier.py``).

    python benchmarks/pair_losses.py --batches 256 1024 --repeats 15
"""

import argparse

import torch
from frozen_classifier import hardware, measure_times, peak_memory, run
from pytorch_metric_learning.losses import NTXentLoss

from pml_compat.losses import RACTLoss

WIDTH, PER_LABEL = 512, 4
TEMPERATURE, MARGIN = 0.01, 0.8
MASKED_GOAL, NTXENT_GOAL = 1.15, 50  # at most that many times the masked matrices; PML at least that many times ours


def data(batch, device):
    """Return new embeddings, old embeddings and labels of a training that is under way."""
    torch.manual_seed(0)
    labels = torch.arange(batch) // PER_LABEL
    old_emb = 0.5 * torch.randn(batch // PER_LABEL + 1, WIDTH)[labels] + torch.randn(batch, WIDTH)
    new_emb = old_emb + torch.randn(batch, WIDTH)
    return new_emb.to(device), old_emb.to(device), labels.to(device)


# Each returns the step {name: (loss of (embeddings, labels), no parameters)}, as frozen_classifier.py runs them.


def ours(old_emb, form, top_k):
    loss_func = RACTLoss(TEMPERATURE, form=form, margin=MARGIN, top_k=top_k)
    return lambda embeddings, labels: loss_func(embeddings, labels, ref_emb=old_emb), []


def masked_matrices(old_emb, form, top_k):
    def negatives(similarities, same):
        masked = similarities.masked_fill(same, -torch.inf)
        return masked if top_k is None else masked.topk(top_k, dim=1).values

    def contrastive(embeddings, labels):
        new, old = torch.nn.functional.normalize(embeddings, dim=1), torch.nn.functional.normalize(old_emb, dim=1)
        same = labels[:, None] == labels
        positive = (new * old).sum(1, keepdim=True)
        logits = torch.cat([positive, negatives(new @ old.t(), same), negatives(new @ new.t(), same)], 1)
        return torch.nn.functional.cross_entropy(logits / TEMPERATURE, torch.zeros_like(labels))

    def triplet(embeddings, labels):
        new, old = torch.nn.functional.normalize(embeddings, dim=1), torch.nn.functional.normalize(old_emb, dim=1)
        same = labels[:, None] == labels
        within = MARGIN + (new - old).norm(dim=1, keepdim=True)
        total = 0
        for rows in (old, new):
            distances = (2 - 2 * negatives(new @ rows.t(), same)).clamp_min(1e-7).sqrt()
            total = total + torch.relu(within - distances).sum(1)
        return (total / (len(labels) - PER_LABEL if top_k is None else top_k)).mean()

    return contrastive if form == "contrastive" else triplet, []


def ntxent(old_emb, batch):
    loss_func = NTXentLoss(TEMPERATURE)
    labels = torch.arange(batch, device=old_emb.device) // PER_LABEL
    index = torch.arange(batch, device=old_emb.device)
    anchors, others = (labels[:, None] != labels).nonzero(as_tuple=True)
    pairs = (index, index, anchors.repeat(2), torch.cat([others, others + batch]))

    def step(embeddings, labels):
        return loss_func(embeddings, indices_tuple=pairs, ref_emb=torch.cat([old_emb, embeddings]))

    return step, []


def check_same(steps, new_emb, labels):
    (loss, gradient), *peers = [run(step, new_emb, labels) for step in steps.values()]
    for peer_loss, peer_gradient in peers:
        torch.testing.assert_close(loss, peer_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, peer_gradient, rtol=1e-3, atol=1e-6)


def main(batches, repeats, device, ntxent_gib):
    print(f"{hardware(device)}; torch {torch.__version__}; D = {WIDTH}; medians of {repeats} repeats.")
    print(f"Goals: RACTLoss / masked matrices <= {MASKED_GOAL}; NTXentLoss / RACTLoss >= {NTXENT_GOAL}.\n")
    print("| B | form | top_k | step | ms | MiB | ours / it, time | it / ours, time |")
    print("|---:|---|---|---|---:|---:|---:|---:|")
    gib = {batch: 4 * 2 * batch**3 / 2**30 for batch in batches}  # of each of NTXentLoss's largest tensors
    small = [batch for batch in batches if gib[batch] <= ntxent_gib]
    for batch in batches:
        new_emb, old_emb, labels = data(batch, device)
        for form, top_k in (("contrastive", None), ("contrastive", 10), ("triplet", None), ("triplet", 10)):
            steps = {
                "RACTLoss": ours(old_emb, form, top_k),
                "masked matrices": masked_matrices(old_emb, form, top_k),
            }
            check_same(steps, new_emb, labels)
            measure(batch, form, top_k, steps, new_emb, labels, repeats)
        if batch in small and batch == max(small):
            steps = {"RACTLoss": ours(old_emb, "contrastive", None), "NTXentLoss": ntxent(old_emb, batch)}
            check_same(steps, new_emb, labels)
            measure(batch, "contrastive", None, steps, new_emb, labels, max(1, repeats // 5))
    for batch in batches:
        if batch not in small:
            print(f"\nNTXentLoss at B = {batch}: not measured, its largest tensors are of {gib[batch]:.0f} GiB each.")


def measure(batch, form, top_k, steps, new_emb, labels, repeats):
    times = measure_times(steps, new_emb, labels, repeats)
    for name, step in steps.items():
        ratio = times["RACTLoss"] / times[name]
        memory = peak_memory(step, new_emb, labels) / 2**20
        cells = "| |" if name == "RACTLoss" else f"| {ratio:.3f} | {1 / ratio:.1f} |"
        k = "all" if top_k is None else top_k
        print(f"| {batch} | {form} | {k} | {name} | {1000 * times[name]:.2f} | {memory:.1f} {cells}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ntxent-gib", type=float, default=0.25, help="the largest tensor that NTXentLoss may make")
    arguments = parser.parse_args()
    main(arguments.batches, arguments.repeats, arguments.device, arguments.ntxent_gib)
