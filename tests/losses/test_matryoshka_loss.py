"""Losses of prefixes: the sum of theirs, each on its own coordinates."""

import pytest
import torch
from pytorch_metric_learning import losses, miners

from pml_compat import fit_width
from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import BCTLoss, CrossModelLoss, MatryoshkaLoss, PointAlignmentLoss

CLASSES, WIDTH = 5, 12


def batch(seed=0, n=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    return embeddings, torch.randint(0, CLASSES, (n,), generator=generator)


def softmax(width, seed=0):
    torch.manual_seed(seed)
    return losses.NormalizedSoftmaxLoss(CLASSES, width)


def bct(width):
    torch.manual_seed(1)
    return BCTLoss(
        softmax(width), FrozenClassifier(torch.randn(3, width), labels=[0, 1, 2], kind="cosine", scale=4.0), 0.5
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [1.0, 0.5, {4: 2.0, 12: 0.25}])
def test_it_is_the_weighted_sum_on_prefixes(seed, weights):
    embeddings, labels = batch(seed)
    loss_func = MatryoshkaLoss({12: softmax(12), 4: bct(4)}, weights)
    loss = loss_func(embeddings, labels)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    again = embeddings.detach().clone().requires_grad_()
    expected = {}
    for width, one in ((4, bct(4)), (12, loss_func.losses["12"].loss)):  # whose class weights were shortened
        weight = weights[width] if isinstance(weights, dict) else weights
        expected[f"first_{width}"] = weight * one(again[:, :width], labels)
    total = sum(expected.values())
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, again)[0])
    assert sorted(loss_func.terms) == ["first_12", "first_4"]
    for name, value in expected.items():
        torch.testing.assert_close(loss_func.terms[name], value.detach())


def test_by_hand():
    embeddings = torch.tensor([[1.0, 0.0, 3.0]])
    loss_func = MatryoshkaLoss({2: PointAlignmentLoss(), 3: PointAlignmentLoss()}, {2: 1.0, 3: 2.0})
    old = torch.tensor([[0.0, 1.0]])
    # first 2: two unit rows at a right angle, squared distance 2; first 3 of width 2: the same, twice
    assert float(loss_func(embeddings, ref_emb=old)) == pytest.approx(2 + 2 * 2)
    assert not loss_func.needs_labels and loss_func.needs_ref_emb


def test_gradcheck():
    embeddings, labels = batch(n=4)
    loss_func = MatryoshkaLoss({4: bct(4), 12: softmax(12)}).double()
    assert torch.autograd.gradcheck(lambda rows: loss_func(rows, labels), embeddings)


def test_coordinates_past_a_prefix_do_not_touch_its_term():
    embeddings, labels = batch()
    loss_func = MatryoshkaLoss({4: bct(4), 12: softmax(12)}, {4: 1.0, 12: 0.0})
    loss_func(embeddings, labels).backward()
    assert embeddings.grad[:, :4].abs().sum() > 0 and not embeddings.grad[:, 4:].any()
    assert float(loss_func.terms["first_12"]) == 0


def test_pairs_and_old_embeddings_go_to_those_who_take_them():
    embeddings, labels = batch()
    old = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pairs = miners.MultiSimilarityMiner()(embeddings, labels)
    contrast = losses.ContrastiveLoss()
    loss_func = MatryoshkaLoss({4: CrossModelLoss(losses.SupConLoss()), 12: contrast})
    assert loss_func.needs_ref_emb and loss_func.needs_labels
    found = loss_func(embeddings, labels, ref_emb=old)
    expected = CrossModelLoss(losses.SupConLoss())(embeddings[:, :4], labels, ref_emb=old) + contrast(
        embeddings, labels
    )
    torch.testing.assert_close(found, expected)
    plain = MatryoshkaLoss({4: contrast, 12: contrast})
    expected = contrast(embeddings[:, :4], labels, pairs) + contrast(embeddings, labels, pairs)
    torch.testing.assert_close(plain(embeddings, labels, pairs), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "losses must map the width of a prefix to its loss"),
        ([softmax(4)], "losses must map the width of a prefix to its loss"),
        ({0: softmax(4)}, "losses' widths"),
        ({4: "softmax"}, "losses must be PML loss objects, got 'softmax' for width 4"),
        ({4: softmax(12)}, r"losses\[4\] must have class weights 4 wide, got 12; make it with embedding_size=4"),
        ({4: bct(12)}, r"losses\[4\] must have class weights 4 wide, got 12"),
    ],
)
def test_what_is_no_loss_of_that_width_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaLoss(given)


def test_errors_of_a_call():
    with pytest.raises(ValueError, match=r"weights must have the widths of losses, \[4, 12\], got \[4\]"):
        MatryoshkaLoss({4: softmax(4), 12: softmax(12)}, {4: 1.0})
    with pytest.raises(ValueError, match=r"weights\[4\]"):
        MatryoshkaLoss({4: softmax(4)}, -1.0)
    loss_func = MatryoshkaLoss({4: softmax(4), 12: softmax(12)})
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="as wide as the longest prefix: expected 12 or more, got 6"):
        loss_func(embeddings[:, :6], labels)
    with pytest.raises(ValueError, match="labels"):
        loss_func(embeddings, labels + CLASSES)
    with pytest.raises(ValueError, match="embeddings"):
        loss_func(torch.where(torch.eye(10, WIDTH) > 0, torch.nan, embeddings), labels)
    with pytest.raises(ValueError, match="ref_emb"):
        MatryoshkaLoss({4: PointAlignmentLoss()})(embeddings)


def test_the_first_coordinates_fit_the_old_gallery_and_all_are_better():
    """Old 4-wide model of 3 of 5 classes; a new one of 12 whose first 4 serve it."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.arange(200) % CLASSES
    data = torch.randn(CLASSES, 20, generator=generator)[labels] + 0.7 * torch.randn(200, 20, generator=generator)
    old = data @ torch.randn(20, 4, generator=generator)
    model = torch.nn.Linear(20, WIDTH)
    centers = ClassCenters.from_embeddings(old[:100], labels[:100])
    first = BCTLoss(losses.NormalizedSoftmaxLoss(CLASSES, 4), centers)
    loss_func = MatryoshkaLoss({4: first, WIDTH: losses.NormalizedSoftmaxLoss(CLASSES, WIDTH)})
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss_func(model(data[:100]), labels[:100]).backward()
        optimizer.step()
    new, old, labels = model(data[100:]).detach(), old[100:], labels[100:]
    new, old = (torch.nn.functional.normalize(rows) for rows in (new, old))
    short = torch.nn.functional.normalize(fit_width(new, 4))
    measure = CrossModelAccuracyCalculator(("mean_average_precision",))

    def found(query, gallery):
        return measure.get_accuracy(query, labels, gallery, labels, ref_includes_query=True)["mean_average_precision"]

    assert found(short, old) > found(old, old) + 0.05
    assert found(new, new) > found(short, short)
