import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import BCTLoss
from tests import reference
from tests.pairwise import pairwise

OLD, NEW = 6, 9  # widths
every_form = pytest.mark.parametrize("weight", [None, 1.0])  # drawn onto directions, measured; the paper's


def batch(seed=0, n=12, width=NEW, classes=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()
    return embeddings, torch.randint(classes, (n,), generator=generator)


def task(width=NEW, classes=8):
    torch.manual_seed(0)
    return losses.NormalizedSoftmaxLoss(classes, width).double()


def old_classifier(kind="cosine", labels=(5, 0, 3), dtype=torch.float64):
    weight = torch.randn(len(labels), OLD, generator=torch.Generator().manual_seed(7), dtype=dtype)
    if kind == "linear":
        return FrozenClassifier(weight, torch.arange(len(labels), dtype=dtype), labels=list(labels))
    return FrozenClassifier(weight, kind="cosine", scale=5.0, labels=list(labels))


def naive(embeddings, labels, classifier, kind, weight, task_value):
    rows = classifier.rows.numpy()

    def old_loss(embedding, row):
        if kind == "linear":
            return reference.linear_losses([embedding], rows, classifier.bias, [row])[0]
        return reference.cosine_losses([embedding], rows, 5.0, [row])[0]

    return reference.bct_loss(
        task_value, embeddings.detach().numpy(), labels.tolist(), classifier.labels.tolist(), old_loss, OLD, weight
    )


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("width", [OLD, NEW, 4])  # equal, first coordinates, zero padding
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_matches_naive_loop(seed, width, kind, weight):
    embeddings, labels = batch(seed, width=width)
    classifier, task_loss = old_classifier(kind), task(width)
    loss = BCTLoss(task_loss, classifier, weight)(embeddings, labels)
    expected = naive(embeddings, labels, classifier, kind, weight, task_loss(embeddings, labels).item())
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.CosineSimilarity()])
def test_pair_losses_of_either_distance_direction_as_task(distance):
    embeddings, labels = batch(n=16)
    positive, negative = (0.1, 0.8) if not distance.is_inverted else (0.8, 0.1)
    task_loss = losses.ContrastiveLoss(positive, negative, distance=distance)
    classifier = old_classifier()
    loss = BCTLoss(task_loss, classifier, 1.0)(embeddings, labels)
    expected = naive(embeddings, labels, classifier, "cosine", 1.0, task_loss(embeddings, labels).item())
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_by_hand():
    task_loss = losses.NormalizedSoftmaxLoss(2, 2, temperature=1.0)
    with torch.no_grad():
        task_loss.W.copy_(torch.eye(2))
    loss_func = BCTLoss(task_loss, FrozenClassifier(torch.tensor([[1.0], [-1.0]])), influence_weight=2.0)
    loss = loss_func(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    # task: log(1 + e^-1); influence: the first coordinate alone, logits (1, -1): log(1 + e^-2)
    torch.testing.assert_close(loss, torch.tensor(0.3132617 + 2 * 0.1269280))
    torch.testing.assert_close(loss_func.terms["task_loss"], torch.tensor(0.3132617))
    torch.testing.assert_close(loss_func.terms["influence_loss"], torch.tensor(2 * 0.1269280))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("width", [OLD, NEW, 4])
def test_gradcheck(kind, width):
    embeddings, labels = batch(n=4, width=width)
    loss_func = BCTLoss(task(width), old_classifier(kind), 0.7, reducer=reducers.DoNothingReducer())

    def influence(e):
        return loss_func(e, labels)["influence_loss"]["losses"]

    labels[0] = 3
    assert torch.autograd.gradcheck(influence, (embeddings,))


@every_form
def test_the_old_classifier_receives_no_gradient_and_does_not_move(weight):
    embeddings, labels = batch()
    loss_func = BCTLoss(task(), old_classifier("linear"), weight)
    before = {name: buffer.clone() for name, buffer in loss_func.old_classifier.named_buffers()}
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=1.0)
    loss_func(embeddings, labels).backward()
    optimizer.step()
    assert {name for name, _ in loss_func.named_parameters()} == {"loss.W"}
    assert embeddings.grad.abs().sum() > 0 and loss_func.loss.W.grad is not None
    for name, buffer in loss_func.old_classifier.named_buffers():
        assert not buffer.requires_grad and buffer.equal(before[name])


@every_form
@pytest.mark.parametrize("embeddings", [torch.zeros(4, NEW), torch.ones(4, NEW)])
def test_gradient_is_finite_at_equal_and_zero_rows(embeddings, weight):
    embeddings = embeddings.clone().requires_grad_()
    loss_func = BCTLoss(task().float(), old_classifier(dtype=torch.float32), weight)
    loss_func(embeddings, torch.tensor([0, 3, 5, 7])).backward()
    assert torch.isfinite(embeddings.grad).all()


@every_form
def test_new_equal_to_an_old_row_has_a_finite_gradient(weight):
    loss = losses.ArcFaceLoss(8, NEW)
    classifier = FrozenClassifier.from_loss(loss)
    embeddings = loss.W.t().detach().clone().requires_grad_()
    BCTLoss(losses.NormalizedSoftmaxLoss(8, NEW), classifier, weight)(embeddings, torch.arange(8)).backward()
    assert torch.isfinite(embeddings.grad).all()


@every_form
def test_without_a_known_label_only_the_task_is_left(weight):
    embeddings, _ = batch()
    labels = torch.full((len(embeddings),), 7)
    loss_func = BCTLoss(task(), old_classifier(), weight)
    loss = loss_func(embeddings, labels)
    assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item())
    assert loss_func.terms["influence_loss"] == 0
    loss.backward()
    assert embeddings.grad.abs().sum() > 0


@every_form
def test_pair_task_and_no_known_label_give_zero_with_a_gradient(weight):
    embeddings, _ = batch(n=1)
    loss = BCTLoss(losses.TripletMarginLoss(), old_classifier(), weight)(embeddings, torch.tensor([7]))
    loss.backward()
    assert loss == 0 and embeddings.grad.abs().sum() == 0


@every_form
def test_pseudo_rows_take_new_classes_in(weight):
    embeddings, labels = batch()
    centers = ClassCenters(torch.randn(8, OLD, dtype=torch.float64), torch.arange(8))
    loss_func = BCTLoss(task(), old_classifier().extend(centers), weight, collect_stats=True)
    loss_func(embeddings, labels)
    assert loss_func.known_fraction == 1.0


@every_form
def test_permuting_the_batch_changes_nothing(weight):
    embeddings, labels = batch()
    order = torch.randperm(len(labels))
    permuted, plain = (BCTLoss(task(), old_classifier(), weight) for _ in range(2))
    close = {"rtol": 1e-5, "atol": 1e-6} if weight is None else {}  # what is measured is float32
    torch.testing.assert_close(permuted(embeddings[order], labels[order]), plain(embeddings, labels), **close)


def test_same_labels_object_or_clone_and_any_integer_type():
    embeddings, labels = batch()
    loss_func = BCTLoss(losses.SupConLoss(), old_classifier(), 1.0)
    expected = loss_func(embeddings, labels)
    for other in (labels.clone(), labels.int(), labels.to(torch.uint8)):
        torch.testing.assert_close(loss_func(embeddings, other), expected)


@pairwise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@every_form
def test_dtypes_stay_what_they_are(dtype, autocast, weight):
    embeddings, labels = batch(dtype=torch.float32)
    low = embeddings.detach().to(dtype).requires_grad_()
    loss_func = BCTLoss(task().float(), old_classifier(dtype=torch.float32), weight)
    expected = loss_func(embeddings, labels)
    before = {name: tensor.dtype for name, tensor in loss_func.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_func(low, labels)
    loss.backward()
    assert low.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.isfinite(low.grad).all()
    if dtype != torch.float64:  # PML itself turns its weights to float64 for float64 embeddings
        assert {name: tensor.dtype for name, tensor in loss_func.state_dict().items()} == before
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)


def test_a_large_half_precision_sum_does_not_overflow_on_the_way():
    embeddings, labels = batch(dtype=torch.float32)
    loss_func = BCTLoss(task().float(), old_classifier(dtype=torch.float32), influence_weight=30000.0)
    low = embeddings.detach().half().requires_grad_()
    loss_func(low, labels).backward()
    assert torch.isfinite(low.grad).all()
    assert (
        torch.isfinite(loss_func.terms["influence_loss"]) and loss_func.terms["influence_loss"].dtype == torch.float32
    )


def test_miner_tuples_reach_the_task_loss_alone():
    embeddings, labels = batch(n=16)
    task_loss = losses.TripletMarginLoss()
    tuples = miners.BatchHardMiner()(embeddings, labels)
    loss_func = BCTLoss(task_loss, old_classifier(), 1.0)
    mined, plain = loss_func(embeddings, labels, tuples), loss_func(embeddings, labels)
    difference = task_loss(embeddings, labels, tuples) - task_loss(embeddings, labels)
    torch.testing.assert_close(mined - plain, difference)
    assert difference != 0


def test_ref_emb_reaches_the_task_loss():
    embeddings, labels = batch()
    ref, ref_labels = batch(1, n=20)
    task_loss = losses.SupConLoss()
    loss_func = BCTLoss(task_loss, old_classifier())
    loss_func(embeddings, labels, ref_emb=ref, ref_labels=ref_labels)
    expected = task_loss(embeddings, labels, ref_emb=ref, ref_labels=ref_labels)
    torch.testing.assert_close(loss_func.terms["task_loss"], expected.detach())


def test_the_task_loss_keeps_its_own_reducer():
    embeddings, labels = batch()
    labels[:] = torch.tensor([0, 3, 5] * 4)
    task_loss = losses.NormalizedSoftmaxLoss(8, NEW, reducer=reducers.ThresholdReducer(low=0.1)).double()
    loss_func = BCTLoss(task_loss, old_classifier(), 1.0, reducer=reducers.ThresholdReducer(low=3.0))
    loss = loss_func(embeddings, labels)
    each, _ = loss_func.old_classifier.losses(embeddings[:, :OLD], labels)
    torch.testing.assert_close(loss, task_loss(embeddings, labels) + each[each > 3].mean())
    assert 0 < (each > 3).sum() < len(each)


def test_regularizer_is_a_third_term():
    embeddings, labels = batch()
    regularizer = regularizers.LpRegularizer()
    loss_func = BCTLoss(task(), old_classifier(), embedding_regularizer=regularizer, embedding_reg_weight=0.5)
    loss = loss_func(embeddings, labels)
    assert loss_func.sub_loss_names() == ["task_loss", "influence_loss", "embedding_reg_loss"]
    torch.testing.assert_close(sum(loss_func.terms.values()), loss.detach())
    expected = 0.5 * regularizer(embeddings)
    torch.testing.assert_close(loss_func.terms["embedding_reg_loss"], expected.detach())


def test_stats_are_recorded_only_when_asked_for():
    embeddings, labels = batch()
    loss_func = BCTLoss(task(), old_classifier(), 0.5, collect_stats=True)
    loss_func(embeddings, labels)
    known = torch.isin(labels, torch.tensor([0, 3, 5])).float().mean().item()
    assert loss_func.known_fraction == pytest.approx(known)
    assert "influence_weight" in loss_func._record_these
    for name in ("task_loss", "influence_loss"):
        assert getattr(loss_func, name) == pytest.approx(loss_func.terms[name].item())
        assert name in loss_func._record_these_stats
    assert not hasattr(BCTLoss(task(), old_classifier()), "known_fraction")


def test_terms_are_empty_before_a_call_and_a_copy_cannot_change_them():
    loss_func = BCTLoss(task(), old_classifier())
    assert loss_func.terms == {}
    loss_func(*batch())
    loss_func.terms.clear()
    assert set(loss_func.terms) == {"task_loss", "influence_loss"}
    assert not any(term.requires_grad for term in loss_func.terms.values())


def test_a_chain_of_upgrades():
    first = BCTLoss(losses.ArcFaceLoss(8, NEW).double(), old_classifier())
    second = BCTLoss(task(12), FrozenClassifier.from_loss(first))
    assert second.old_classifier.in_features == NEW and second.old_classifier.head.margin == first.loss.margin
    assert torch.isfinite(second(*batch(width=12)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (task(), old_classifier(), -0.1), r"influence_weight must be .* at least 0, got -0.1"),
        (lambda: (task(), old_classifier(), float("nan")), r"influence_weight must be .* got nan"),
        (lambda: (task(), old_classifier(), "much"), r"influence_weight must be .* got 'much'"),
        (
            lambda: (task(), torch.nn.Linear(2, 2)),
            r"old_classifier must be a FrozenClassifier, got Linear; .*from_loss",
        ),
        (lambda: (losses.ArcFaceLoss, old_classifier()), r"loss must be a PML loss object"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        BCTLoss(*arguments())


def poisoned(value):
    embeddings = torch.ones(3, NEW, dtype=torch.float64)
    embeddings[2, 1] = value
    return embeddings


ONES = torch.ones(3, NEW, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (poisoned(torch.nan), LABELS, r"embeddings must be finite, row 2"),
        (poisoned(-torch.inf), LABELS, r"embeddings must be finite, row 2"),
        (ONES[:0], LABELS[:0], r"embeddings must not be empty"),
        (ONES[0], LABELS, r"embeddings must be 2-dimensional"),
        (ONES.long(), LABELS, r"embeddings must be floating point"),
        (ONES, None, r"labels must be given, got None"),
        (ONES, LABELS[:2], r"labels must have one entry a row: expected 3, got 2"),
        (ONES, LABELS.double(), r"labels must be integers, got torch.float64"),
        (ONES, LABELS - 1, r"labels must be in \[0, 7\], the task loss's classes, got -1"),
        (ONES, LABELS + 6, r"labels must be in \[0, 7\], the task loss's classes, got 8"),
    ],
)
def test_bad_calls(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        BCTLoss(task(), old_classifier())(embeddings, labels)


def test_pair_losses_take_any_label_of_0_or_more():
    loss_func = BCTLoss(losses.TripletMarginLoss(), old_classifier())
    assert torch.isfinite(loss_func(ONES, LABELS + 10**9))
    with pytest.raises(ValueError, match=r"labels must be 0 or more, got -1"):
        loss_func(ONES, LABELS - 1)


def test_wrong_device():
    loss_func = BCTLoss(losses.TripletMarginLoss(), old_classifier().to("meta"))
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        loss_func(ONES, LABELS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_form
def test_gpu_gives_what_the_cpu_gives(dtype, weight):
    embeddings, labels = batch(dtype=torch.float32)
    loss_func = BCTLoss(task().float(), old_classifier(dtype=torch.float32), weight)
    expected = loss_func(embeddings, labels)
    loss_func.cuda()
    on_gpu = embeddings.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = loss_func(on_gpu, labels)  # labels may stay on the CPU, as in PML
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02) and torch.isfinite(on_gpu.grad).all()
