"""BCT, LCE, UniBCT, MixBCT, NCCL and others without a weight: onto directions, as strongly as the task loss draws.

The multiplier is read from ``loss.balance`` here; test_gradient_balance.py holds it against its formula.
"""

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, reducers
from torch.nn.functional import normalize

from pml_compat.frozen import ClassCenters, FrozenClassifier, class_weights
from pml_compat.frozen.prototypes import refine_prototypes
from pml_compat.losses import (
    BCAlignerLoss,
    BCTLoss,
    CompatibleLoss,
    FCTLoss,
    LCELoss,
    MixBCTLoss,
    NCCLLoss,
    UniBCTLoss,
)
from pml_compat.transformations import LinearTransformation
from tests import reference
from tests.pairwise import pairwise

OLD, NEW, CLASSES = 5, 7, 6
EXACT = 1e-6  # what is measured is float32


def batch(seed=0, n=12, width=NEW, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return embeddings, torch.randint(CLASSES, (n,), generator=generator)


def task(width=NEW, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return losses.NormalizedSoftmaxLoss(CLASSES, width).to(dtype)


def centers(labels=range(CLASSES), width=OLD, dtype=torch.float64, seed=3, counts=None):
    """Centres whose directions are elsewhere; no boundaries."""
    generator = torch.Generator().manual_seed(seed)
    rows, directions = torch.randn(2, len(labels), width, generator=generator, dtype=dtype)
    return ClassCenters(rows, torch.tensor(list(labels)), counts=counts, directions=directions)


def by_label(rows, labels):
    return dict(zip(labels.tolist(), rows.double().numpy(), strict=True))


def measured(loss_func, name):
    return float(loss_func.balance.weight(name))


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


# BCT.


def classifier_of(kind, dtype=torch.float64):
    if kind == "linear":
        weight = torch.randn(3, OLD, generator=torch.Generator().manual_seed(7), dtype=dtype)
        return FrozenClassifier(weight, torch.arange(3), labels=[4, 0, 2])
    return FrozenClassifier.from_centers(centers([4, 0, 2], dtype=dtype))


def naive_draw(embeddings, labels, classifier):
    """1 - cos of the known samples, each at the old width."""
    fitted = [reference.fit_width(e, classifier.in_features) for e in embeddings.detach().double().numpy()]
    directions = by_label(classifier.directions, classifier.labels)
    return reference.direction_losses(fitted, labels.tolist(), directions)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("width", [OLD, NEW, 3])  # equal, first coordinates, zeros appended
@pytest.mark.parametrize("kind", ["linear", "centres"])
def test_bct_matches_naive_loop_over_several_calls(seed, width, kind):
    loss_func = BCTLoss(task(width), classifier_of(kind))
    for call in range(3):
        embeddings, labels = batch(10 * seed + call, width=width)
        loss = loss_func(embeddings, labels)
        draw = measured(loss_func, "influence_loss") * np.mean(naive_draw(embeddings, labels, loss_func.old_classifier))
        assert loss_func.terms["influence_loss"].item() == pytest.approx(draw, rel=EXACT)
        assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item() + draw, rel=EXACT)


@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.CosineSimilarity()])
def test_bct_with_pair_losses_of_either_distance_direction(distance):
    embeddings, labels = batch(n=16)
    positive, negative = (0.8, 0.1) if distance.is_inverted else (0.1, 0.8)
    loss_func = BCTLoss(losses.ContrastiveLoss(positive, negative, distance=distance), classifier_of("centres"))
    loss = loss_func(embeddings, labels)
    draw = measured(loss_func, "influence_loss") * np.mean(naive_draw(embeddings, labels, loss_func.old_classifier))
    assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item() + draw, rel=EXACT)


def test_bct_by_hand():
    """(3, 4, 9) at the old width is (0.6, 0.8); its class's direction is along x, its class's row along y."""
    old = ClassCenters(torch.eye(2), torch.tensor([1, 0]), directions=torch.tensor([[0.0, 5.0], [2.0, 0.0]]))
    loss_func = BCTLoss(losses.ContrastiveLoss(), FrozenClassifier.from_centers(old))
    with torch.no_grad():  # nothing is measured, the multiplier is 1
        loss = loss_func(torch.tensor([[3.0, 4.0, 9.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 7]))
    assert loss.item() == pytest.approx(1 - 0.6) and loss_func.terms["influence_loss"] == loss


def test_bct_draws_known_rows_as_strongly_as_the_task_does():
    embeddings, labels = batch()
    loss_func = BCTLoss(task(), classifier_of("centres"))
    loss_func(embeddings, labels).backward()
    task_gradient = gradient(loss_func.loss(embeddings, labels), embeddings)
    drawn, known = embeddings.grad - task_gradient, torch.isin(labels, torch.tensor([0, 2, 4]))
    assert drawn.norm(dim=1).sum().item() == pytest.approx(task_gradient[known].norm(dim=1).sum().item(), rel=1e-5)
    torch.testing.assert_close(drawn[~known], torch.zeros_like(drawn[~known]))
    assert 0 < known.sum() < len(known) and (drawn[:, OLD:] == 0).all()
    weights_gradient = gradient(loss_func.loss(embeddings, labels), loss_func.loss.W)
    torch.testing.assert_close(loss_func.loss.W.grad, weights_gradient)  # the draw is the embeddings' alone


@pytest.mark.parametrize("reducer", [reducers.SumReducer(), reducers.ThresholdReducer(low=0.0)])
def test_the_draw_has_the_losss_reducer(reducer):
    embeddings, labels = batch()
    plain = BCTLoss(task(), classifier_of("centres"), reducer=reducers.DoNothingReducer())
    each = plain(embeddings, labels)["influence_loss"]["losses"]
    loss_func = BCTLoss(task(), classifier_of("centres"), reducer=reducer)
    loss_func(embeddings, labels)
    expected = each.sum() if isinstance(reducer, reducers.SumReducer) else each[each > 0].mean()
    torch.testing.assert_close(loss_func.terms["influence_loss"], expected.detach())


# LCE.

MAPS = {"direct": (NEW, False, False), "forward": (OLD, True, False), "backward": (OLD, False, True)}
MAPS["both"] = (OLD, True, True)
every_mode = pytest.mark.parametrize("mode", MAPS)


def lce(mode, labels=range(CLASSES), weights=(), task_loss=None, dtype=torch.float64, **kwargs):
    width, forward, backward = MAPS[mode]
    torch.manual_seed(5)
    maps = [
        LinearTransformation(d_in, d_out).to(dtype) if there else None
        for there, d_in, d_out in ((forward, OLD, NEW), (backward, NEW, OLD))
    ]
    named = {"forward_transformation": maps[0], "backward_transformation": maps[1]}
    old = centers(labels, width, dtype)
    return LCELoss(task(dtype=dtype) if task_loss is None else task_loss, old, *weights, **named, **kwargs)


def apply(transformation):
    if transformation is None:
        return None
    return lambda row: transformation(torch.from_numpy(row)[None]).detach().numpy()[0]


def naive_lce(loss_func, embeddings, labels):
    """Return both terms before their multipliers. A map of the gallery takes centres: it will map what they are of."""
    old, forward, backward = loss_func.old_centers, loss_func.forward_transformation, loss_func.backward_transformation
    aims = by_label(old.directions if forward is None else old.centers, old.labels)
    weights = class_weights(loss_func.loss).detach().numpy()
    directions = [reference.unit(weights[label]) for label in aims]
    align = reference.lce_alignment(directions, list(aims.values()), apply(forward), apply(backward))
    points = [reference.unit(e) for e in embeddings.detach().numpy()]
    if backward is not None:
        points = [apply(backward)(point) for point in points]
    elif forward is not None:
        aims = {label: apply(forward)(center) for label, center in aims.items()}
    return align, np.mean(reference.direction_losses(points, labels.tolist(), aims))


@pytest.mark.parametrize("seed", [0, 1, 2])
@every_mode
def test_lce_matches_naive_loop(seed, mode):
    loss_func = lce(mode)
    for call in range(2):
        embeddings, labels = batch(10 * seed + call)
        loss = loss_func(embeddings, labels)
        align, draw = naive_lce(loss_func, embeddings, labels)
        expected = [measured(loss_func, "align_loss") * align, measured(loss_func, "boundary_loss") * draw]
        found = [loss_func.terms[name].item() for name in ("align_loss", "boundary_loss")]
        assert found == pytest.approx(expected, rel=EXACT)
        assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item() + sum(expected), rel=EXACT)


@every_mode
def test_lce_with_one_weight_balances_the_other_term_alone(mode):
    embeddings, labels = batch()
    loss_func = lce(mode, weights=(30.0, None))
    loss_func(embeddings, labels)
    assert loss_func.balance.names == ["boundary_loss"]
    old = loss_func.old_centers
    weights = [reference.unit(w) for w in class_weights(loss_func.loss).detach().numpy()]
    maps = apply(loss_func.forward_transformation), apply(loss_func.backward_transformation)
    align = reference.lce_alignment(weights, list(old.centers.numpy()), *maps)  # the paper's: centres
    assert loss_func.terms["align_loss"].item() == pytest.approx(30 * align, rel=1e-9)
    _, draw = naive_lce(loss_func, embeddings, labels)
    expected = measured(loss_func, "boundary_loss") * draw
    assert loss_func.terms["boundary_loss"].item() == pytest.approx(expected, rel=EXACT)
    other = lce(mode, weights=(None, 0.0))
    other(embeddings, labels)
    assert other.balance.names == ["align_loss"] and other.terms["boundary_loss"] == 0


def test_lce_by_hand():
    task_loss = losses.NormalizedSoftmaxLoss(2, 2, temperature=1.0)
    with torch.no_grad():
        task_loss.W.copy_(3 * torch.eye(2))
    old = ClassCenters(torch.eye(2), torch.arange(2), directions=torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    loss_func = LCELoss(task_loss, old)
    with torch.no_grad():  # nothing is measured, the multipliers are 1
        loss_func(torch.tensor([[0.0, 5.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    # weights (1, 0), (0, 1) against (0, 1), (0.6, 0.8): 1 + 1 + 0.36 + 0.04; cosines 1 and 0.6
    assert loss_func.terms["align_loss"].item() == pytest.approx(2.4 / 4)
    assert loss_func.terms["boundary_loss"].item() == pytest.approx((0 + 0.4) / 2)


def test_lce_with_centres_in_any_order_of_some_classes():
    embeddings, labels = batch(n=24)
    with pytest.warns(UserWarning, match=r"3 without a centre .*: 1, 2, 5"):
        loss_func = lce("direct", labels=[4, 0, 3])
    loss_func(embeddings, labels).backward()
    align, draw = naive_lce(loss_func, embeddings, labels)
    assert loss_func.terms["align_loss"].item() == pytest.approx(measured(loss_func, "align_loss") * align, rel=EXACT)
    expected = measured(loss_func, "boundary_loss") * draw
    assert loss_func.terms["boundary_loss"].item() == pytest.approx(expected, rel=EXACT)
    again = embeddings.detach().requires_grad_()
    unknown = torch.isin(labels, torch.tensor([1, 2, 5]))
    torch.testing.assert_close(embeddings.grad[unknown], gradient(loss_func.loss(again, labels), again)[unknown])


def test_lce_draws_classes_of_one_sample_too_and_asks_for_no_boundaries():
    embeddings, _ = batch(n=4)
    old = centers(width=NEW, counts=torch.tensor([1, 5, 5, 5, 5, 5]))
    with pytest.warns(UserWarning):
        loss_func = LCELoss(task(), old)
    loss_func(embeddings, torch.zeros(4, dtype=torch.long))
    assert old.boundaries is None and loss_func.terms["boundary_loss"] > 0


def test_lce_with_pair_losses_draws_embeddings_alone():
    embeddings, labels = batch()
    loss_func = lce("direct", labels=range(100, 106), task_loss=losses.ContrastiveLoss())
    loss = loss_func(embeddings, labels + 100)
    directions = by_label(loss_func.old_centers.directions, loss_func.old_centers.labels)
    draws = reference.direction_losses(embeddings.detach().numpy(), (labels + 100).tolist(), directions)
    expected = measured(loss_func, "boundary_loss") * np.mean(draws)
    assert loss_func.terms["align_loss"] == 0
    assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item() + expected, rel=EXACT)


@every_mode
def test_lces_gradient_reaches_what_learns_and_nothing_old(mode):
    embeddings, labels = batch()
    loss_func = lce(mode)
    before = {name: buffer.clone() for name, buffer in loss_func.named_buffers() if name.startswith("old_")}
    loss_func(embeddings, labels).backward()
    assert embeddings.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss_func.parameters())
    for name, buffer in loss_func.named_buffers():
        assert not buffer.requires_grad
        assert name.startswith("balance.") or buffer.equal(before[name])


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.NormalizedSoftmaxLoss(CLASSES, NEW),  # (D, C)
        lambda: losses.ProxyAnchorLoss(CLASSES, NEW),  # (C, D)
    ],
)
@pytest.mark.parametrize("labels", [range(CLASSES), [4, 0]])
@pytest.mark.filterwarnings("ignore:LCELoss leaves out")
def test_the_alignment_is_as_strong_as_the_task_on_the_class_weights_that_it_draws(make, labels):
    """Class by class, whichever way a loss of PML stores them; the classes without a centre do not count."""
    torch.manual_seed(0)
    embeddings, targets = batch(n=24)
    loss_func = lce("direct", labels=labels, task_loss=make().double())
    parameter = next(loss_func.loss.parameters())
    loss_func(embeddings, targets)
    old = loss_func.old_centers
    apart = normalize(class_weights(loss_func.loss), dim=1)[old.labels] - old.directions
    found = [gradient(loss, parameter) for loss in (loss_func.loss(embeddings, targets), apart.square().mean())]
    by_class = [(g if len(g) == CLASSES else g.t()).numpy() for g in found]
    assert measured(loss_func, "align_loss") == pytest.approx(reference.gradient_balance([by_class]), rel=1e-5)


# UniBCT.


def stored(seed=3, n=40):
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (OLD, NEW))
    return old, new, torch.arange(n) % CLASSES


@pytest.mark.parametrize("width", [OLD, NEW, 3])
def test_unibct_matches_naive_loop(width):
    embeddings, labels = batch(width=width)
    loss_func = UniBCTLoss(task(width), centers([4, 0, 2]))
    loss = loss_func(embeddings, labels)
    draw = measured(loss_func, "influence_loss") * np.mean(naive_draw(embeddings, labels, loss_func.old_classifier))
    assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item() + draw, rel=EXACT)
    torch.testing.assert_close(loss_func.old_classifier.directions, centers([4, 0, 2]).directions)


@pytest.mark.parametrize(("scale", "margin"), [(8.0, 0.0), (8.0, 0.3), (None, 0.3)])
def test_unibct_with_a_scale_or_a_margin_has_the_papers_form_at_the_measured_multiplier(scale, margin):
    embeddings, labels = batch()
    prototypes = ClassCenters(centers().centers, torch.arange(CLASSES), scale=2.0)  # the one that fits best
    loss_func = UniBCTLoss(task(), prototypes, scale=scale, margin=margin)
    loss_func(embeddings, labels)
    found = []
    for embedding, label in zip(embeddings.detach().numpy(), labels.tolist(), strict=True):
        angles = [reference.angle(embedding[:OLD], row) for row in prototypes.centers.numpy()]
        logits = [(scale or 2.0) * math.cos(a + margin * (j == label)) for j, a in enumerate(angles)]
        found.append(reference.cross_entropy(logits, label))
    expected = measured(loss_func, "influence_loss") * np.mean(found)
    assert loss_func.terms["influence_loss"].item() == pytest.approx(expected, rel=EXACT)


def test_unibct_with_a_weight_takes_the_scale_that_fits_best():
    embeddings, labels = batch()
    prototypes = ClassCenters(centers().centers, torch.arange(CLASSES), scale=2.0)
    found, expected = (UniBCTLoss(task(), prototypes, 1.0, scale=scale)(embeddings, labels) for scale in (None, 2.0))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weight", [None, 0.0])
def test_an_update_moves_the_directions_of_its_classes(weight, monkeypatch):
    """Also at a weight of 0, the paper's for the first epochs, which may be followed by None."""
    monkeypatch.setattr("pml_compat.frozen.class_directions._STEPS", 20)
    old, new, stored_labels = stored()
    loss_func = UniBCTLoss(task(), centers([5, 3, 1, 0]), weight)
    before = loss_func.old_classifier.directions
    kept, some = before.clone(), (stored_labels == 0) | (stored_labels == 3)
    loss_func.update_prototypes(old[some], new[some], stored_labels[some])
    loss_func.influence_weight = None
    refined = refine_prototypes(old[some], new[some], stored_labels[some])
    torch.testing.assert_close(loss_func.old_classifier.directions[[3, 1]], refined.directions)
    assert loss_func.old_classifier.directions[[0, 2]].equal(kept[[0, 2]]) and before.equal(kept)


# MixBCT.


def mixbct(task_loss=None, dtype=torch.float64, **kwargs):
    return MixBCTLoss(task(NEW, dtype) if task_loss is None else task_loss, **kwargs)


def pair(seed=0, n=20, dtype=torch.float64):
    new, labels = batch(seed, n, dtype=dtype)
    return new, labels, 3 * torch.randn(n, NEW, generator=torch.Generator().manual_seed(seed + 50), dtype=dtype) + 1


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("draw_weight", [None, 2.5])
def test_mixbct_matches_naive_loop(seed, draw_weight):
    loss_func = mixbct(draw_weight=draw_weight, seed=seed)
    mixed, seen = mixbct(draw_weight=0.0, seed=seed), []
    for call in range(5):
        new, labels, old = pair(10 * seed + call)
        loss = loss_func(new, labels, ref_emb=old)
        seen.append((old.numpy(), labels.tolist()))
        draws = reference.mixbct_draws(new.detach().numpy(), old.numpy(), labels.tolist(), seen)
        multiplier = draw_weight or measured(loss_func, "draw_loss")
        assert loss_func.terms["draw_loss"].item() == pytest.approx(multiplier * np.mean(draws), rel=EXACT)
        task_loss = mixed(new, labels, ref_emb=old)  # of the same rows
        assert loss.item() == pytest.approx(task_loss.item() + multiplier * np.mean(draws), rel=EXACT)


def test_mixbct_with_pair_losses_draws_onto_the_old_rows():
    new, labels, old = pair()
    loss_func = mixbct(losses.ContrastiveLoss())
    loss_func(new, labels, ref_emb=old)
    draws = reference.mixbct_draws(new.detach().numpy(), old.numpy(), labels.tolist(), None)
    expected = measured(loss_func, "draw_loss") * np.mean(draws)
    assert loss_func.terms["draw_loss"].item() == pytest.approx(expected, rel=EXACT)


def test_mixbct_by_hand():
    """Class 0's old rows are (1, 0) and (0.8, 0.6), class 1's (0, 1): C's moments are 1.64, 1.36 and 0.48, over 3.

    C^-1/2 takes (1.8, 0.6), the sum of class 0, to a multiple of (adj C^1/2)(1.8, 0.6), and of a 2 x 2 matrix the root
    is (C + sqrt(det C) 1) / sqrt(tr C + 2 sqrt(det C)).
    """
    loss_func = MixBCTLoss(losses.NormalizedSoftmaxLoss(2, 2), share=0.0, draw_weight=4.0)
    old, labels = torch.tensor([[9.0, 0.0], [0.4, 0.3], [0.0, 0.1]]), torch.tensor([0, 0, 1])
    root = math.sqrt(1.64 * 1.36 - 0.48**2)
    aim = (1.36 + root) * 1.8 - 0.48 * 0.6, (1.64 + root) * 0.6 - 0.48 * 1.8
    new = torch.tensor([[3.0, 0.0], [0.0, 7.0], [*aim]])
    loss_func(new, labels, ref_emb=old)
    other = -0.48 * 1, 1.64 + root
    cosines = [aim[0] / math.hypot(*aim), aim[1] / math.hypot(*aim)]
    cosines.append((aim[0] * other[0] + aim[1] * other[1]) / math.hypot(*aim) / math.hypot(*other))
    assert loss_func.terms["draw_loss"].item() == pytest.approx(4 * (1 - sum(cosines) / 3), rel=1e-4)


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_mixbct_whitens_at_the_first_call_the_second_the_fourth_and_so_on(monkeypatch, calls):
    decompositions, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda moments: decompositions.append(moments) or eigh(moments))
    loss_func = mixbct()
    for call in range(calls):
        new, labels, old = pair(call)
        loss_func(new, labels, ref_emb=old)
    assert len(decompositions) == calls.bit_length()


def test_mixbcts_draw_moves_new_embeddings_alone():
    new, labels, old = pair()
    old.requires_grad_()
    loss_func, paper = mixbct(), mixbct(draw_weight=0.0)
    loss_func(new, labels, ref_emb=old).backward()
    assert old.grad is None and (new.grad.norm(dim=1) > 0).all()  # also the rows that are replaced
    paper(new.detach().requires_grad_(), labels, ref_emb=old).backward()
    torch.testing.assert_close(loss_func.loss.W.grad, paper.loss.W.grad)


def test_a_resumed_mixbct_goes_on_bit_for_bit():
    """What it has seen of the old classes is in its state."""

    def train(loss_func, steps):
        values = []
        for step in steps:
            new, labels, old = pair(step, dtype=torch.float32)
            loss = loss_func(new, labels, ref_emb=old)
            loss.backward()
            values.append(loss.item())
        return values

    whole, stopped, resumed = (mixbct(dtype=torch.float32) for _ in range(3))
    expected, first = train(whole, range(6)), train(stopped, range(3))
    train(resumed, [9])
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    other = copy.deepcopy(stopped)
    assert first + train(resumed, range(3, 6)) == first + train(other, range(3, 6)) == expected
    assert not whole.old_classes.sums.requires_grad and first == train(mixbct(dtype=torch.float32), range(3))


def test_mixbct_in_eval_mode_draws_nothing():
    new, labels, old = pair()
    loss_func = mixbct().eval()
    assert loss_func(new, labels, ref_emb=old) == loss_func.loss(new, labels)
    assert loss_func.terms["draw_loss"] == 0 and loss_func.balance.is_new


# NCCL and losses of old embeddings.


@pytest.mark.parametrize("logit_weight", [0.0, 0.5, None])
def test_nccls_terms_are_the_papers_at_measured_multipliers(logit_weight):
    given = {"feature_weight": 1.0, "logit_weight": 1.0, "temperature": 0.1}
    paper, loss_func = (
        NCCLLoss(task(), 30, embedding_size=OLD, **options) for options in (given, {"logit_weight": logit_weight})
    )
    for call in range(3):
        embeddings, labels = batch(call)
        old = batch(call + 20, width=OLD)[0].detach()
        loss = loss_func(embeddings, labels, ref_emb=old)
        paper(embeddings, labels, ref_emb=old)
        logit = measured(loss_func, "logit_loss") if logit_weight is None else logit_weight
        terms = measured(loss_func, "feature_loss") * paper.terms["feature_loss"], logit * paper.terms["logit_loss"]
        for name, expected in zip(("feature_loss", "logit_loss"), terms, strict=True):
            torch.testing.assert_close(loss_func.terms[name], expected, rtol=EXACT, atol=0)
        torch.testing.assert_close(loss, paper.terms["task_loss"] + sum(terms), rtol=EXACT, atol=0)
    assert (paper.old_queue == loss_func.old_queue).all()


def test_compatible_losses_old_losses_have_measured_multipliers():
    embeddings, labels = batch()
    old = batch(9)[0].detach()
    loss_func = CompatibleLoss(task(), FCTLoss())
    loss = loss_func(embeddings, labels, ref_emb=old)
    term, task_loss = FCTLoss()(embeddings, ref_emb=old), loss_func.loss(embeddings, labels)
    found = [gradient(value, embeddings).numpy() for value in (task_loss, term)]
    multiplier = reference.gradient_balance([found])
    assert measured(loss_func, "old_loss") == pytest.approx(multiplier, rel=EXACT)
    assert loss.item() == pytest.approx((task_loss + multiplier * term).item(), rel=EXACT)


# Corners of all of them.

FORMS = {
    "bct": lambda: (BCTLoss(task(dtype=torch.float32), classifier_of("centres", torch.float32)), False),
    "bct_pairs": lambda: (BCTLoss(losses.ContrastiveLoss(), classifier_of("linear", torch.float32)), False),
    "lce": lambda: (lce("direct", dtype=torch.float32), False),
    "lce_forward": lambda: (lce("forward", dtype=torch.float32), False),
    "lce_backward": lambda: (lce("backward", dtype=torch.float32), False),
    "unibct": lambda: (UniBCTLoss(task(dtype=torch.float32), centers(dtype=torch.float32)), False),
    "mixbct": lambda: (mixbct(dtype=torch.float32), True),
    "bc_aligner": lambda: (
        BCAlignerLoss(
            task(dtype=torch.float32),
            LinearTransformation(NEW, NEW, bias=False),
            previous_maps=LinearTransformation(NEW, OLD, bias=False),
        ),
        True,
    ),
    "mixbct_pairs": lambda: (mixbct(losses.ContrastiveLoss()), True),
}


def aims_of(loss_func, labels, old):
    """Return embeddings that lie where they are drawn to, as far as this is known beforehand."""
    if hasattr(loss_func, "old_classifier"):
        classifier = loss_func.old_classifier
        rows = classifier.directions[classifier.index_of(labels).clamp(min=0)]
        return torch.nn.functional.pad(rows, (0, NEW - OLD))
    if hasattr(loss_func, "old_centers") and loss_func.old_centers.centers.shape[1] == NEW:
        return loss_func.old_centers.directions[labels]
    return old


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["zero", "on the aim", "opposite", "one zero row", "zero old"])
def test_gradients_are_finite_at_the_corners(name, dtype, case):
    loss_func, with_old = FORMS[name]()
    new, labels, old = pair(n=12, dtype=torch.float32)
    new = new.detach()
    on_aim = aims_of(loss_func, labels, old).clone()
    rows = {"zero": torch.zeros_like(new), "on the aim": on_aim, "opposite": -on_aim}.get(case, new).to(dtype)
    if case == "one zero row":
        rows[3] = 0
    if case == "zero old":
        old = torch.zeros_like(old)
    rows.requires_grad_()
    for _ in range(2):
        loss = loss_func(rows, labels, **({"ref_emb": old} if with_old else {}))
        loss.backward()
        # The slope of PML's losses at a row of length 0 is past the numbers of float16; no other is.
        counted = (rows != 0).any(1) if dtype == torch.float16 else slice(None)
        assert torch.isfinite(rows.grad[counted]).all()
        assert torch.isfinite(loss) or (case == "opposite" and dtype == torch.float16)  # see the next test
        assert all(torch.isfinite(parameter.grad).all() for parameter in loss_func.parameters())
    assert torch.isfinite(loss_func.balance.term_lengths).all()


def test_a_term_with_next_to_no_slope_draws_no_stronger_than_the_task():
    """Opposite to its direction a row is as far as can be, and flat: the multiplier is large, what it draws is not."""
    loss_func, (_, labels, old) = FORMS["unibct"]()[0], pair(n=12)
    rows = -aims_of(loss_func, labels, old).float()
    rows.requires_grad_()
    loss = loss_func(rows, labels)
    loss.backward()
    task_gradient = gradient(loss_func.loss(rows, labels), rows)
    assert torch.isfinite(loss) and measured(loss_func, "influence_loss") > 1e4
    assert (rows.grad - task_gradient).norm(dim=1).sum() < 1.01 * task_gradient.norm(dim=1).sum()


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_any_length_are_drawn_alike(name):
    """The terms are of directions: a longer embedding has the same loss."""
    found = []
    for factor in (1.0, 10.0):
        loss_func, with_old = FORMS[name]()
        new, labels, old = pair(n=12, dtype=torch.float32)
        with torch.no_grad():
            loss_func(factor * new, labels, **({"ref_emb": old} if with_old else {}))
        found.append([value for key, value in loss_func.terms.items() if key != "task_loss"])
    torch.testing.assert_close(found[1], found[0])
