"""The fixed simplex, and each new embedding to its own old one."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.losses import CoReSLoss, HOCLoss
from pml_compat.losses.hoc_loss import feature_losses
from tests import reference
from tests.pairwise import pairwise

CLASSES = 5
WIDTH = CLASSES - 1


def batch(seed=0, n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 2 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    old = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return embeddings.to(dtype).requires_grad_(), labels, old.to(dtype)


def naive_features(embeddings, labels, old, scale):
    """One old row at a time; its negatives are the new rows of other labels, and its own row is none of them."""
    new, old = ([reference.unit(row) for row in rows.detach().double().numpy()] for rows in (embeddings, old))
    found = []
    for i, row in enumerate(old):
        negatives = [math.exp(scale * float(row @ a)) for j, a in enumerate(new) if labels[j] != labels[i]]
        found.append(math.log(sum(negatives)) - scale * float(row @ new[i]) if negatives else 0.0)
    return sum(found) / len(found)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("n", [7, 1])
def test_matches_naive_loop(seed, share, scale, n):
    embeddings, labels, old = batch(seed, n)
    loss_func = HOCLoss(CLASSES, share, scale)
    loss = float(loss_func(embeddings, labels, ref_emb=old))
    features = naive_features(embeddings, labels, old, scale)
    corners = reference.simplex(CLASSES)
    task = [
        reference.cross_entropy([float(row @ corner) for corner in corners], label)
        for row, label in zip(embeddings.detach().numpy(), labels.tolist(), strict=True)
    ]
    simplex = sum(task) / n
    assert loss == pytest.approx(share * simplex + (1 - share) * features, rel=1e-6, abs=1e-6)
    assert float(loss_func.terms["feature_loss"]) == pytest.approx((1 - share) * features, rel=1e-6, abs=1e-6)


def test_by_hand():
    new, old = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    # the first two have one negative, at -1 and 0; the third two, at 0 and 1, and its own new row at 0
    expected = (-1 - 1) + (0 - 1) + math.log(1 + math.e)
    loss_func = HOCLoss(num_classes=3, task_share=0.0, scale=1.0)
    assert float(loss_func(new, labels, ref_emb=old)) == pytest.approx(expected / 3)


def test_what_is_of_the_same_class_is_no_negative():
    """Not even one of similarity 0, which a mask of products would leave in the sum."""
    embeddings, _, old = batch()
    alone = HOCLoss(CLASSES, 0.0)(embeddings[:2], torch.tensor([0, 1]), ref_emb=old[:2])
    rows = torch.cat([embeddings[:2], embeddings[:1]]).detach()  # the first once more
    three = HOCLoss(CLASSES, 0.0)(rows, torch.tensor([0, 1, 0]), ref_emb=torch.cat([old[:2], old[:1]]))
    own, other = feature_losses(*(normalize(r[:2]) for r in (embeddings, old)), torch.tensor([0, 1]), 10.0)
    assert float(alone) == pytest.approx(float(own + other) / 2)
    assert float(three) == pytest.approx(float(2 * own + other + math.log(2)) / 3)  # two negatives for the other class


def test_without_negatives_the_simplex_alone_is_left():
    embeddings, _, old = batch()
    labels = torch.zeros(7, dtype=torch.long)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        loss = HOCLoss(CLASSES, 0.1)(embeddings, labels, ref_emb=old)
        (gradient,) = torch.autograd.grad(loss, embeddings)
    simplex = 0.1 * CoReSLoss(CLASSES)(embeddings, labels)
    torch.testing.assert_close(loss, simplex)
    torch.testing.assert_close(gradient, torch.autograd.grad(simplex, embeddings)[0])


def test_gradcheck_and_nothing_else_learns():
    embeddings, labels, old = batch(n=5)
    old.requires_grad_()
    loss_func = HOCLoss(CLASSES, 0.3).double()
    assert torch.autograd.gradcheck(lambda rows: loss_func(rows, labels, ref_emb=old), embeddings)
    loss_func(embeddings, labels, ref_emb=old).backward()
    assert old.grad is None and list(loss_func.parameters()) == [] and list(loss_func.state_dict()) == []


def test_new_is_old_and_rows_of_length_0_have_finite_gradients():
    _, labels, old = batch(dtype=torch.float32)
    for rows, references in ((old.clone(), old), (torch.zeros_like(old), old), (old.clone(), torch.zeros_like(old))):
        rows = rows.requires_grad_()
        loss = HOCLoss(CLASSES)(rows, labels, ref_emb=references)
        assert torch.autograd.grad(loss, rows)[0].isfinite().all()


def test_lengths_of_old_embeddings_do_not_count_and_those_of_new_ones_on_the_simplex_alone():
    embeddings, labels, old = batch()
    loss_func = HOCLoss(CLASSES)
    expected = loss_func(embeddings, labels, ref_emb=old)
    torch.testing.assert_close(loss_func(embeddings, labels, ref_emb=3 * old), expected)
    terms = loss_func.terms
    loss_func(3 * embeddings, labels, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["feature_loss"], terms["feature_loss"])
    assert loss_func.terms["task_loss"] != terms["task_loss"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    embeddings, labels, old = batch(dtype=dtype)
    found = HOCLoss(CLASSES)(embeddings, labels, ref_emb=old)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, HOCLoss(CLASSES)(embeddings.float(), labels, ref_emb=old.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"task_share": -0.1}, "task_share"),
        ({"task_share": 1.5}, r"task_share must be in \[0, 1\], got 1.5"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_errors_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        HOCLoss(**({"num_classes": CLASSES} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_emb": None}, "ref_emb must be given"),
        ({"ref_emb": torch.randn(7, WIDTH + 1)}, "ref_emb"),
        ({"ref_emb": torch.randn(6, WIDTH)}, "ref_emb must be shaped like embeddings"),
        ({"ref_emb": torch.full((7, WIDTH), torch.nan)}, "ref_emb must be finite"),
        ({"embeddings": torch.randn(7, WIDTH + 1)}, "num_classes - 1 wide: expected 4, got 5"),
        ({"labels": torch.full((7,), CLASSES)}, r"labels must be in \[0, 4\]"),
        ({"labels": None}, "labels"),
        ({"ref_labels": torch.full((7,), 99)}, "ref_labels must equal labels"),
    ],
)
def test_errors_of_a_call(change, message):
    embeddings, labels, old = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        HOCLoss(CLASSES)(**({"embeddings": embeddings, "labels": labels, "ref_emb": old} | change))


def test_it_holds_new_embeddings_to_old_ones():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.arange(100) % CLASSES
    data = torch.randn(CLASSES, 20, generator=generator)[labels] + torch.randn(100, 20, generator=generator)
    found, old = {}, None
    for name, loss_func in (("old", CoReSLoss(CLASSES)), ("CoReS", CoReSLoss(CLASSES)), ("HOC", HOCLoss(CLASSES))):
        model = torch.nn.Linear(20, WIDTH)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            references = {"ref_emb": old} if name == "HOC" else {}
            loss_func(model(data), labels, **references).backward()
            optimizer.step()
        rows = model(data).detach()
        if old is None:
            old = rows
        found[name] = float(feature_losses(normalize(rows), normalize(old), labels, 10.0).mean())
    assert found["HOC"] < found["CoReS"] - 0.1
