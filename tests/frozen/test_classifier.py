import copy
import io
import pickle

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import DoNothingReducer
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from pml_compat.frozen import ClassCenters, FrozenClassifier, class_weights, heads, log_sum_exp
from pml_compat.losses import BCTLoss
from tests import reference

C, D, N = 7, 6, 9

PER_SAMPLE_LOSSES = {
    "arcface": lambda: pml_losses.ArcFaceLoss(C, D),
    "arcface_wide_margin": lambda: pml_losses.ArcFaceLoss(C, D, margin=100, scale=8),
    "cosface": lambda: pml_losses.CosFaceLoss(C, D, margin=0.2, scale=10),
    "large_margin": lambda: pml_losses.LargeMarginSoftmaxLoss(C, D),
    "large_margin_3": lambda: pml_losses.LargeMarginSoftmaxLoss(C, D, margin=3, scale=2.0),
    "sphereface": lambda: pml_losses.SphereFaceLoss(C, D),
    "normalized_softmax": lambda: pml_losses.NormalizedSoftmaxLoss(C, D, temperature=0.1),
    "sub_center_arcface": lambda: pml_losses.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, sub_centers=3),
    "soft_triple": lambda: pml_losses.SoftTripleLoss(C, D, centers_per_class=4),
    "proxy_nca": lambda: pml_losses.ProxyNCALoss(C, D, softmax_scale=3),
    "proxy_nca_plain": lambda: pml_losses.ProxyNCALoss(C, D, distance=LpDistance(power=2, normalize_embeddings=False)),
    "proxy_nca_cosine": lambda: pml_losses.ProxyNCALoss(C, D, softmax_scale=9, distance=CosineSimilarity()),
}
BATCH_LOSSES = {
    "proxy_anchor": lambda: pml_losses.ProxyAnchorLoss(C, D),
    "p2s_grad": lambda: pml_losses.P2SGradLoss(D, C),
}
ALL_LOSSES = PER_SAMPLE_LOSSES | BATCH_LOSSES


def batch(seed=0, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, D, generator=generator, dtype=dtype).requires_grad_()
    return embeddings, torch.randint(C, (n,), generator=generator)


def weight(seed=0, rows=C, dtype=torch.float64):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(100 + seed), dtype=dtype)


def make(kind, rows=C, dtype=torch.float64):
    if kind == "linear":
        return FrozenClassifier(weight(rows=rows, dtype=dtype), torch.arange(rows, dtype=dtype) / 10)
    if kind == "cosine":
        return FrozenClassifier(weight(rows=rows, dtype=dtype), kind="cosine", scale=7.5)
    torch.manual_seed(0)
    return FrozenClassifier.from_loss(ALL_LOSSES[kind]().to(dtype))


KINDS = ["linear", "cosine", *ALL_LOSSES]


@pytest.fixture(params=[0, 512], ids=["in blocks", "at once"])
def either_way(request, monkeypatch):
    """Few classes are taken all at once, many in blocks; here few are taken in blocks too."""
    monkeypatch.setattr(heads, "_FEW_ROWS", request.param)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_matches_naive_loop(seed):
    embeddings, labels = batch(seed)
    bias = torch.randn(C, dtype=torch.float64)
    losses, known = FrozenClassifier(weight(seed), bias).losses(embeddings, labels)
    expected = reference.linear_losses(embeddings.detach().numpy(), weight(seed).numpy(), bias, labels.tolist())
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-12)
    assert known.all()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scale", [None, 1.0, 64.0])
def test_cosine_matches_naive_loop(seed, scale):
    embeddings, labels = batch(seed)
    losses, _ = FrozenClassifier(weight(seed), kind="cosine", scale=scale).losses(embeddings, labels)
    expected = reference.cosine_losses(
        embeddings.detach().numpy(), weight(seed).numpy(), 16.0 if scale is None else scale, labels.tolist()
    )
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-10, atol=1e-12)


def test_by_hand():
    losses, _ = FrozenClassifier(torch.eye(2), torch.tensor([0.0, 1.0])).losses(torch.eye(2), torch.tensor([0, 0]))
    # logits (1, 1) and (0, 2)
    torch.testing.assert_close(losses, torch.tensor([2.0, 1 + np.exp(2.0)]).log(), check_dtype=False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", PER_SAMPLE_LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_from_loss_is_the_pml_loss(name, seed):
    torch.manual_seed(seed)
    loss = ALL_LOSSES[name]().double()
    loss.reducer = DoNothingReducer()
    embeddings, labels = batch(seed, n=64)
    expected = loss(embeddings, labels)["loss"]["losses"]
    (expected_grad,) = torch.autograd.grad(expected.sum(), embeddings)
    losses, _ = FrozenClassifier.from_loss(loss).losses(embeddings, labels)
    (grad,) = torch.autograd.grad(losses.sum(), embeddings)
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_losses_that_couple_samples_are_taken_one_sample_at_a_time(name):
    loss = ALL_LOSSES[name]().double()
    embeddings, labels = batch()
    expected = torch.stack([loss(embeddings[i : i + 1], labels[i : i + 1]) for i in range(N)])
    losses, _ = FrozenClassifier.from_loss(loss).losses(embeddings, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    classifier = make(kind)
    embeddings, labels = batch(n=4)
    assert torch.autograd.gradcheck(lambda e: classifier.losses(e, labels)[0], (embeddings,), fast_mode=False)


@pytest.mark.parametrize("kind", ["linear", "cosine", "normalized_softmax", "proxy_nca", "proxy_nca_plain"])
def test_without_a_margin_the_loss_is_the_cross_entropy_of_the_logits(kind):
    classifier = make(kind)
    embeddings, labels = batch()
    expected = torch.nn.functional.cross_entropy(classifier.logits(embeddings), labels, reduction="none")
    torch.testing.assert_close(classifier.losses(embeddings, labels)[0], expected)


def test_logits_carry_a_gradient_and_the_old_scale():
    loss = pml_losses.ArcFaceLoss(C, D).double()
    embeddings, _ = batch()
    classifier = FrozenClassifier.from_loss(loss)
    torch.testing.assert_close(classifier(embeddings), loss.get_logits(embeddings))
    classifier.logits(embeddings).sum().backward()
    assert embeddings.grad is not None


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["zero", "row", "opposite"])
def test_gradients_are_finite_at_the_edges(kind, case):
    classifier = make(kind, dtype=torch.float32)
    k = classifier.head.centers_per_class
    row = classifier.rows[3 * k].clone()
    embeddings = {"zero": torch.zeros(D), "row": row, "opposite": -row}[case].repeat(2, 1).requires_grad_()
    losses, _ = classifier.losses(embeddings, torch.tensor([3, 1]))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(embeddings.grad).all()


def test_blocks_give_what_one_buffer_gives(monkeypatch):
    embeddings, labels = torch.randn(5, D, dtype=torch.float64).requires_grad_(), torch.tensor([0, 63, 64, 299, 150])
    for classifier in (
        FrozenClassifier(weight(rows=300), torch.randn(300).double()),
        FrozenClassifier.from_loss(
            pml_losses.SubCenterArcFaceLoss(num_classes=300, embedding_size=D, sub_centers=2).double()
        ),
    ):
        monkeypatch.setattr(heads, "_FEW_ROWS", 0)
        whole, _ = classifier.losses(embeddings, labels)
        monkeypatch.setitem(log_sum_exp._BLOCK_ELEMENTS, "cpu", 1)  # the least: 64 classes at a time
        blocks, _ = classifier.losses(embeddings, labels)
        torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(x.sum(), embeddings)[0] for x in (whole, blocks)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_logits_with_a_bias_of_another_dtype(dtype, own):
    classifier = FrozenClassifier(torch.eye(2, dtype=own), torch.tensor([0.5, -0.5], dtype=own))
    logits = classifier.logits(torch.tensor([[1.0, 2.0]], dtype=dtype))
    assert logits.dtype == dtype and logits.tolist() == [[1.5, 1.5]]


@pytest.mark.usefixtures("either_way")
def test_logits_far_apart_do_not_overflow():
    embeddings = torch.full((2, D), 300.0, requires_grad=True)
    classifier = FrozenClassifier(weight(dtype=torch.float32) * 100)
    losses, _ = classifier.losses(embeddings, torch.tensor([0, 1]))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(embeddings.grad).all()


@pytest.mark.usefixtures("either_way")
def test_one_class_costs_nothing():
    embeddings = torch.randn(3, D, requires_grad=True)
    losses, _ = FrozenClassifier(torch.ones(1, D)).losses(embeddings, torch.zeros(3, dtype=torch.long))
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and embeddings.grad.abs().max() == 0


def test_unknown_labels_are_left_out():
    embeddings, _ = batch()
    labels = torch.tensor([10, 99, 20, -1, 10, 0, 20, 20, 3])
    classifier = FrozenClassifier(weight(rows=2), labels=torch.tensor([20, 10]))
    losses, known = classifier.losses(embeddings, labels)
    assert known.tolist() == [True, False, True, False, True, False, True, True, False]
    assert losses[~known].abs().max() == 0
    expected, _ = FrozenClassifier(weight(rows=2)).losses(embeddings[known], torch.tensor([1, 0, 1, 0, 0]))
    torch.testing.assert_close(losses[known], expected)
    losses.sum().backward()
    assert embeddings.grad[~known].abs().max() == 0 and embeddings.grad[known].abs().min() > 0


def test_strided_labels_are_taken_without_a_warning():
    classifier = FrozenClassifier(torch.eye(3), labels=[4, 2, 7])
    embeddings, labels = torch.eye(3), torch.tensor([4, 0, 2, 0, 7, 0])
    losses, known = classifier.losses(embeddings, labels[::2])
    assert known.all()
    assert torch.equal(losses, classifier.losses(embeddings, labels[::2].clone())[0])


def test_no_known_label_gives_zero_with_a_gradient():
    embeddings, _ = batch()
    losses, known = make("linear").losses(embeddings, torch.full((N,), 1000))
    losses.sum().backward()
    assert not known.any() and losses.abs().max() == 0 and embeddings.grad.abs().max() == 0


def test_numpy_and_list_maps_are_taken():
    for labels in ([4, 2], np.array([4, 2]), torch.tensor([4, 2], dtype=torch.int32)):
        classifier = FrozenClassifier(weight(rows=2), labels=labels)
        assert classifier.labels.tolist() == [4, 2]
        assert classifier.index_of(torch.tensor([2, 3, 4])).tolist() == [1, -1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    classifier = make(kind, dtype=torch.float32)
    embeddings, labels = batch(dtype=torch.float32)
    expected, _ = classifier.losses(embeddings, labels)
    low = embeddings.detach().to(dtype).requires_grad_()
    losses, _ = classifier.losses(low, labels)
    losses.sum().backward()
    assert losses.dtype == low.grad.dtype == classifier.logits(low).dtype == dtype
    assert classifier.rows.dtype == torch.float32
    torch.testing.assert_close(losses.float(), expected, rtol=0.1, atol=0.1)


def test_autocast_does_not_change_the_result():
    classifier = make("cosine", dtype=torch.float32)
    embeddings, labels = batch(dtype=torch.float32)
    expected, _ = classifier.losses(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = classifier.losses(embeddings, labels)
        logits = classifier.logits(embeddings)
    assert losses.equal(expected) and logits.equal(classifier.logits(embeddings))


@pytest.mark.parametrize("kind", KINDS)
def test_is_frozen_and_independent_of_its_source(kind):
    torch.manual_seed(0)
    if kind in ("linear", "cosine"):
        source = torch.nn.Linear(D, C)
        classifier = FrozenClassifier(source.weight, kind=kind)
    else:
        source = ALL_LOSSES[kind]()
        classifier = FrozenClassifier.from_loss(source)
    assert not list(classifier.parameters())
    before = classifier.rows.clone()
    with torch.no_grad():
        next(source.parameters()).mul_(-1)
    assert classifier.rows.equal(before)
    embeddings, labels = batch(dtype=torch.float32)
    classifier.losses(embeddings, labels)[0].sum().backward()
    assert all(p.grad is None for p in source.parameters()) and not classifier.rows.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dict(kind):
    classifier, (embeddings, labels) = make(kind), batch()
    expected, drawn = classifier.losses(embeddings, labels)[0], classifier.direction_losses(embeddings, labels)[0]
    other = FrozenClassifier._with_head(
        classifier.head, torch.randn_like(classifier.rows), classifier.bias, torch.arange(C).flip(0)
    )
    buffer = io.BytesIO()
    torch.save(classifier.state_dict(), buffer)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier)), other):
        assert twin.losses(embeddings, labels)[0].equal(expected)
        assert twin.direction_losses(embeddings, labels)[0].equal(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_states_from_before_there_were_directions_load(kind):
    source = make(kind)
    state = {name: tensor for name, tensor in source.state_dict().items() if name != "directions"}
    target = FrozenClassifier._with_head(source.head, torch.randn_like(source.rows), source.bias, torch.arange(C))
    target.load_state_dict(state)
    torch.testing.assert_close(target.directions, source.directions)
    assert "directions" not in state  # the user's own
    loss_func = torch.nn.ModuleDict({"classifier": target})  # with a prefix
    loss_func.load_state_dict({f"classifier.{name}": tensor for name, tensor in state.items()})


def test_follows_to():
    classifier = make("linear").float()
    assert classifier.rows.dtype == classifier.bias.dtype == torch.float32
    assert classifier.to("meta").rows.device.type == classifier.directions.device.type == "meta"


def test_from_layer():
    layer = torch.nn.Linear(D, C).double()
    embeddings, _ = batch()
    torch.testing.assert_close(FrozenClassifier.from_layer(layer).logits(embeddings), layer(embeddings))
    plain = FrozenClassifier.from_layer(torch.nn.Linear(D, 2, bias=False), labels=[5, 3])
    assert plain.bias is None and plain.index_of(torch.tensor([3])).item() == 1


def test_from_centers():
    centers = ClassCenters(torch.randn(3, D), torch.tensor([7, 1, 4]))
    classifier = FrozenClassifier.from_centers(centers)
    assert classifier.labels.tolist() == [7, 1, 4] and classifier.head.scale == 16.0
    embeddings = torch.randn(2, D)
    cosines = torch.nn.functional.normalize(embeddings, dim=1) @ centers.centers.t()
    torch.testing.assert_close(FrozenClassifier.from_centers(centers, scale=2).logits(embeddings), 2 * cosines)


@pytest.mark.parametrize("kind", KINDS)
def test_extend_adds_rows_for_the_labels_it_lacks(kind):
    classifier, (embeddings, _) = make(kind), batch()
    before = classifier.logits(embeddings)
    length = classifier.rows.norm(dim=1).mean()
    centers = ClassCenters(torch.randn(3, D, dtype=torch.float64), torch.tensor([50, 2, 40]))
    assert classifier.extend(centers) is classifier
    assert classifier.labels.tolist() == [*range(C), 50, 40]
    after = classifier.logits(embeddings)
    assert after.shape == (N, C + 2)
    torch.testing.assert_close(after[:, :C], before)
    k = classifier.head.centers_per_class
    torch.testing.assert_close(classifier.rows[C * k :: k], centers.centers[[0, 2]] * length)
    losses, known = classifier.losses(embeddings, torch.full((N,), 40))
    assert known.all() and torch.isfinite(losses).all()
    if classifier.bias is not None:
        torch.testing.assert_close(classifier.bias[C:], classifier.bias[:C].mean().expand(2))


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_those_of_the_rows(kind):
    """Of several centres the mean direction, as class_weights has it."""
    classifier = make(kind)
    rows = [reference.unit(row) for row in classifier.rows.numpy()]
    k = classifier.head.centers_per_class
    expected = [reference.unit(sum(rows[start : start + k])) for start in range(0, len(rows), k)]
    np.testing.assert_allclose(classifier.directions, expected, rtol=1e-9)
    assert not classifier.directions.requires_grad


def with_directions(labels, seed=5, scale=None):
    rows, directions = torch.randn(2, len(labels), D, generator=torch.Generator().manual_seed(seed)).double()
    return ClassCenters(rows, torch.tensor(labels), directions=directions, scale=scale)


def test_from_centers_takes_their_directions_and_the_scale_that_fits_best():
    centers = with_directions([7, 1, 4], scale=3.0)
    classifier = FrozenClassifier.from_centers(centers)
    assert classifier.head.scale == 3.0 and classifier.directions.equal(centers.directions)
    torch.testing.assert_close(classifier.rows, centers.centers)
    assert FrozenClassifier.from_centers(centers, scale=5.0).head.scale == 5.0
    classifier.directions.zero_()  # its own: the centres' stay
    assert centers.directions.norm() > 1
    measured = ClassCenters.from_embeddings(torch.randn(30, D), torch.arange(30) % 3)
    assert FrozenClassifier.from_centers(measured).head.scale == measured.scale


@pytest.mark.parametrize("kind", KINDS)
def test_extend_takes_directions_of_measured_centres_for_known_labels_too(kind):
    classifier, centers = make(kind), with_directions([50, 2, 40, 5])
    rows, directions = classifier.rows.clone(), classifier.directions.clone()
    classifier.extend(centers)
    assert classifier.labels.tolist() == [*range(C), 50, 40]
    torch.testing.assert_close(classifier.directions[[C, 2, C + 1, 5]], centers.directions)
    untouched = [0, 1, 3, 4, 6]
    assert classifier.directions[untouched].equal(directions[untouched])
    torch.testing.assert_close(classifier.rows[: len(rows)], rows)  # the true rows stay
    again = make(kind).extend(with_directions([5, 2]))  # with nothing new
    torch.testing.assert_close(again.directions[[5, 2]], with_directions([5, 2]).directions)
    assert len(again.labels) == C


@pytest.mark.parametrize("kind", ["cosine", "sub_center_arcface"])
def test_extend_keeps_the_directions_of_known_labels_where_centres_were_not_measured(kind):
    classifier = make(kind)
    directions = classifier.directions.clone()
    centers = ClassCenters(torch.randn(3, D, dtype=torch.float64), torch.tensor([50, 2, 40]))
    classifier.extend(centers)
    assert classifier.directions[:C].equal(directions)
    torch.testing.assert_close(classifier.directions[C:], centers.centers[[0, 2]])


def test_extend_with_nothing_new():
    classifier = make("cosine")
    rows = classifier.rows
    assert classifier.extend(ClassCenters(torch.randn(2, D), torch.tensor([0, 1]))).rows is rows


# How far a sample is from the direction of its class.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_direction_losses_match_naive_loop(kind, seed):
    classifier, (embeddings, labels) = make(kind), batch(seed)
    labels[3] = 99
    losses, known = classifier.direction_losses(embeddings, labels)
    directions = dict(enumerate(classifier.directions.numpy()))
    expected = reference.direction_losses(embeddings.detach().numpy(), labels.tolist(), directions)
    assert known.tolist() == [label != 99 for label in labels.tolist()] and losses[3] == 0
    np.testing.assert_allclose(losses.detach()[known], expected, rtol=1e-12)


def test_direction_losses_by_hand():
    classifier = FrozenClassifier(torch.tensor([[0.0, 7.0], [-2.0, 0.0]]), labels=[4, 9])
    embeddings = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]])
    losses, known = classifier.direction_losses(embeddings, torch.tensor([4, 9, 4, 9]))
    torch.testing.assert_close(losses, torch.tensor([0.2, 1.6, 1.0, 0.0]))
    assert known.all()


@pytest.mark.parametrize("kind", ["linear", "cosine", "soft_triple"])
def test_gradcheck_of_direction_losses(kind):
    classifier, (embeddings, labels) = make(kind), batch(n=4)
    labels[0] = 99
    assert torch.autograd.gradcheck(lambda e: classifier.direction_losses(e, labels)[0], (embeddings,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_and_corners_of_direction_losses(dtype, autocast):
    classifier = make("cosine", dtype=torch.float32)
    exact = torch.cat([classifier.directions, -classifier.directions, torch.zeros(C, D)])
    embeddings, labels = exact.to(dtype).requires_grad_(), torch.arange(C).repeat(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses, _ = classifier.direction_losses(embeddings, labels)
    losses.sum().backward()
    expected = torch.tensor([0.0, 2.0, 1.0]).repeat_interleave(C).to(dtype)
    torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=1e-2 if dtype.itemsize == 2 else 1e-6)
    assert torch.isfinite(embeddings.grad).all() and embeddings.grad[-C:].abs().sum() == 0
    assert classifier.directions.dtype == torch.float32 and not classifier.directions.requires_grad


def test_bad_calls_of_direction_losses():
    classifier, (embeddings, labels) = make("cosine"), batch()
    for rows, targets, message in [
        (embeddings[:, 1:], labels, rf"embeddings must be {D} wide, got width {D - 1}"),
        (embeddings * torch.nan, labels, r"embeddings must be finite, row 0"),
        (embeddings, labels[1:], rf"labels must have one entry a row: expected {N}, got {N - 1}"),
    ]:
        with pytest.raises(ValueError, match=message):
            classifier.direction_losses(rows, targets)
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the FrozenClassifier: got cpu and meta"):
        classifier.to("meta").direction_losses(embeddings, labels)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_class_weights_are_rows_with_a_graph(name):
    loss = ALL_LOSSES[name]()
    rows = class_weights(loss)
    assert rows.shape == (C, D)
    rows.sum().backward()
    assert next(loss.parameters()).grad is not None


def test_class_weights_by_hand():
    loss = pml_losses.SubCenterArcFaceLoss(num_classes=2, embedding_size=2, sub_centers=2)
    with torch.no_grad():  # columns 0 and 1 belong to class 0, 2 and 3 to class 1
        loss.W.copy_(torch.tensor([[2.0, 0.0, -1.0, -5.0], [0.0, 3.0, 0.0, 0.0]]))
    torch.testing.assert_close(class_weights(loss), torch.tensor([[0.5, 0.5], [-1.0, 0.0]]))
    arcface = pml_losses.ArcFaceLoss(C, D)
    assert class_weights(arcface).equal(arcface.W.t())
    proxy = pml_losses.ProxyAnchorLoss(C, D)
    assert class_weights(proxy).equal(proxy.proxies)


def test_class_weights_of_wrapped_losses():
    loss = pml_losses.CosFaceLoss(C, D)
    for wrapped in (BCTLoss(loss, make("cosine")), DistributedLossWrapper(loss)):
        assert class_weights(wrapped).equal(loss.W.t())
        assert FrozenClassifier.from_loss(wrapped).head.margin == loss.margin


@pytest.mark.parametrize("loss", [pml_losses.TripletMarginLoss(), pml_losses.ManifoldLoss(l=D), torch.nn.Linear(2, 2)])
def test_losses_without_class_weights(loss):
    for function in (class_weights, FrozenClassifier.from_loss):
        with pytest.raises(ValueError, match=rf"{type(loss).__name__} has none; .*from_centers"):
            function(loss)


@pytest.mark.parametrize(
    "loss",
    [
        pml_losses.NormalizedSoftmaxLoss(C, D, distance=LpDistance()),
        pml_losses.NormalizedSoftmaxLoss(C, D, distance=DotProductSimilarity(normalize_embeddings=False)),
        pml_losses.ProxyAnchorLoss(C, D, distance=LpDistance(power=2)),
        pml_losses.ProxyNCALoss(C, D, distance=LpDistance(p=1)),
    ],
)
def test_other_distances_are_refused_with_a_way_out(loss):
    with pytest.raises(ValueError, match=r"default distance to be frozen.*class_weights\(loss\), kind='cosine'"):
        FrozenClassifier.from_loss(loss)
    assert FrozenClassifier(class_weights(loss), kind="cosine").in_features == D


EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FrozenClassifier(torch.tensor([[torch.nan, 0.0]])), r"weight must be finite, row 0"),
        (lambda: FrozenClassifier(torch.ones(3)), r"weight must be 2-dimensional"),
        (lambda: FrozenClassifier(torch.ones(2, 2, dtype=torch.long)), r"weight must be floating point"),
        (lambda: FrozenClassifier(torch.zeros(0, 2)), r"weight must not be empty"),
        (lambda: FrozenClassifier(EYE, torch.zeros(3)), r"bias must have one entry a class, \(2,\), got \(3,\)"),
        (lambda: FrozenClassifier(EYE, torch.tensor([0.0, torch.inf])), r"bias must be finite, row 1"),
        (lambda: FrozenClassifier(EYE, EYE[0], kind="cosine"), r"bias must be None with kind='cosine'"),
        (lambda: FrozenClassifier(EYE, kind="dot"), r"kind must be 'linear' or 'cosine', got 'dot'"),
        (lambda: FrozenClassifier(EYE, scale=3.0), r"scale must be None with kind='linear', got 3.0"),
        (lambda: FrozenClassifier(EYE, kind="cosine", scale=0), r"scale must be a finite number above 0, got 0"),
        (lambda: FrozenClassifier(EYE, kind="cosine", scale=float("nan")), r"scale must be .* got nan"),
        (lambda: FrozenClassifier(EYE * torch.tensor([1.0, 0.0]), kind="cosine"), r"no row of length 0"),
        (lambda: FrozenClassifier(EYE, labels=[1, 1]), r"labels must not repeat, got 1 more than once"),
        (lambda: FrozenClassifier(EYE, labels=[0, -1]), r"labels must be 0 or more, got -1"),
        (lambda: FrozenClassifier(EYE, labels=[0]), r"labels must have one entry a row: expected 2, got 1"),
        (lambda: FrozenClassifier(EYE, labels=[0.5, 1.0]), r"labels must be integers"),
        (lambda: FrozenClassifier.from_layer(torch.nn.Identity()), r"layer must be a torch.nn.Linear, got Identity"),
        (lambda: FrozenClassifier.from_centers(EYE), r"centers must be a ClassCenters, got Tensor"),
        (lambda: FrozenClassifier(EYE).extend(EYE), r"centers must be a ClassCenters, got Tensor"),
        (
            lambda: FrozenClassifier(EYE).extend(ClassCenters(torch.eye(3), torch.arange(3))),
            r"centers must be 2 wide, got width 3",
        ),
    ],
)
def test_bad_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.long), r"embeddings must be 2 wide, got width 3"),
        (torch.ones(2), torch.zeros(2, dtype=torch.long), r"embeddings must be 2-dimensional"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), r"embeddings must not be empty"),
        (torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.long), r"embeddings must be floating point"),
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.zeros(2, dtype=torch.long), r"finite, row 1"),
        (EYE, None, r"labels must be given, got None"),
        (EYE, torch.zeros(3, dtype=torch.long), r"labels must have one entry a row: expected 2, got 3"),
        (EYE, torch.zeros(2), r"labels must be integers, got torch.float32"),
    ],
)
def test_bad_calls(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        FrozenClassifier(EYE).losses(embeddings, labels)


def test_wrong_device():
    with pytest.raises(ValueError, match=r"device of the FrozenClassifier: got cpu and meta; move .* \.to\('cpu'\)"):
        FrozenClassifier(EYE).to("meta").losses(EYE, torch.tensor([0, 1]))
