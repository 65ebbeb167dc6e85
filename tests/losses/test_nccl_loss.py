import copy
import io
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from pml_compat.frozen import class_weights
from pml_compat.losses import NCCLLoss
from tests.pairwise import pairwise
from tests.reference import fit_width, unit

OLD, NEW, CLASSES = 5, 7, 4


def task(width=NEW, seed=0):
    torch.manual_seed(seed)
    return losses.NormalizedSoftmaxLoss(CLASSES, width).double()


def batch(seed=0, n=6, old=OLD, new=NEW, dtype=torch.float64):
    """New embeddings, labels and old embeddings of the same items."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, new, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return embeddings, labels, torch.randn(n, old, generator=generator, dtype=torch.float64).to(dtype)


def nccl(queue_size=20, old=OLD, new=NEW, **kwargs):
    given = {"feature_weight": 1.0, "logit_weight": 0.5, "temperature": 0.3} | kwargs
    return NCCLLoss(task(new), queue_size, embedding_size=old, **given)


class NaiveQueue:
    """The last rows and labels, and the two terms, one sample and one queued row at a time."""

    def __init__(self, size):
        self.size, self.rows = size, []

    def add(self, old, labels):
        self.rows = (self.rows + list(zip(old.numpy(), labels.tolist(), strict=True)))[-max(self.size, len(labels)) :]

    def end(self):
        self.rows = self.rows[-self.size :]

    def terms(self, embeddings, labels, old, weights, temperature):
        weights = np.array([unit(w) for w in weights.detach().numpy()])
        width, new_width = old.shape[1], embeddings.shape[1]

        def logits(row):
            return unit(weights @ unit(row))

        def one(i, similarity):
            values = [similarity(o) / temperature for o, _ in self.rows]
            top = max(values)
            total = top + math.log(sum(math.exp(v - top) for v in values))
            own = unit(old[i].numpy())
            pulls = [
                -(1 + float(own @ unit(o))) / 2 * (value - total)
                for value, (o, y) in zip(values, self.rows, strict=True)
                if y == int(labels[i])
            ]
            return sum(pulls) / len(pulls)

        feature, logit = [], []
        for i, new in enumerate(embeddings.detach().numpy()):
            anchor = unit(fit_width(new, width))
            feature.append(one(i, lambda o, anchor=anchor: float(anchor @ unit(o))))
            z = logits(new)
            logit.append(one(i, lambda o, z=z: float(z @ logits(fit_width(o, new_width)))))
        return np.mean(feature), np.mean(logit)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), [(5, 5), (5, 7), (5, 3)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("queue_size", [4, 6, 11, 100])  # below, equal, not a multiple, never full
def test_matches_naive_loop_over_several_calls(seed, old, new, temperature, queue_size):
    loss_func = nccl(queue_size, old, new, feature_weight=2.0, temperature=temperature)
    naive = NaiveQueue(queue_size)
    for call in range(5):
        embeddings, labels, ref_emb = batch(10 * seed + call, old=old, new=new)
        loss = loss_func(embeddings, labels, ref_emb=ref_emb)
        naive.add(ref_emb, labels)
        feature, logit = naive.terms(embeddings, labels, ref_emb, class_weights(loss_func.loss), temperature)
        naive.end()
        task_loss = loss_func.loss(embeddings, labels).item()
        assert loss_func.terms["feature_loss"].item() == pytest.approx(2 * feature, rel=1e-6)
        assert loss_func.terms["logit_loss"].item() == pytest.approx(0.5 * logit, rel=1e-6)
        assert loss.item() == pytest.approx(task_loss + 2 * feature + 0.5 * logit, rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: losses.ArcFaceLoss(CLASSES, NEW),
        lambda: losses.LargeMarginSoftmaxLoss(CLASSES, NEW),
        lambda: losses.ProxyAnchorLoss(CLASSES, NEW),
        lambda: losses.SoftTripleLoss(CLASSES, NEW, centers_per_class=2),
        lambda: losses.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=NEW),
    ],
)
def test_any_head(loss):
    torch.manual_seed(0)
    loss_func = NCCLLoss(loss().double(), embedding_size=OLD, feature_weight=1.0, logit_weight=1.0, temperature=1.0)
    embeddings, labels, old = batch()
    loss_func(embeddings, labels, ref_emb=old).backward()
    naive = NaiveQueue(100)
    naive.add(old, labels)
    _, logit = naive.terms(embeddings, labels, old, class_weights(loss_func.loss), 1.0)
    assert loss_func.terms["logit_loss"].item() == pytest.approx(logit, rel=1e-6)
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss_func.parameters())


def test_by_hand():
    """One new sample, two queued rows of its label and one of another; temperature 1, old rows at 0, 90, 180 degrees.

    Similarities 1, 0, -1; log of their softmax: -log Z, ... with Z = e + 1 + 1/e. Weights (1 + cos) / 2 with the own
    old row, at 0 degrees: 1, 1/2, 0.
    """
    total = math.log(math.e + 1 + 1 / math.e)
    loss_func = NCCLLoss(losses.ContrastiveLoss(), 8, embedding_size=2, feature_weight=1.0, temperature=1.0)
    loss_func.fill(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]), torch.tensor([5, 6]))
    loss = loss_func(torch.tensor([[4.0, 0.0]]), torch.tensor([5]), ref_emb=torch.tensor([[0.5, 0.0]]))
    assert loss.item() == pytest.approx((1 * (total - 1) + 0.5 * total) / 2, rel=1e-6)
    loss_func.fill(torch.tensor([[-1.0, 0.0]]), torch.tensor([5]))  # a third positive, of weight 0
    total = math.log(2 * math.e + 1 + 2 / math.e)
    loss = loss_func(torch.tensor([[4.0, 0.0]]), torch.tensor([5]), ref_emb=torch.tensor([[0.5, 0.0]]))
    assert loss.item() == pytest.approx((2 * (total - 1) + 0.5 * total) / 4, rel=1e-6)


def test_logits_by_hand():
    """Class weights along the axes: the cosine of the logits is that of the embeddings, in the plane of the axes."""
    task_loss = losses.NormalizedSoftmaxLoss(2, 3)
    with torch.no_grad():
        task_loss.W.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]]))
    loss_func = NCCLLoss(task_loss, 8, embedding_size=3, feature_weight=0, logit_weight=1.0, temperature=1.0)
    loss_func.fill(torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([1]))
    loss_func(torch.tensor([[1.0, 0.0, 7.0]]), torch.tensor([0]), ref_emb=torch.tensor([[3.0, 0.0, 4.0]]))
    assert loss_func.terms["logit_loss"].item() == pytest.approx(math.log(math.e + 1) - 1, rel=1e-5)


# The queue.


def queue_of(loss_func):
    return loss_func.old_queue.clone(), loss_func.old_queue_labels.tolist()


def test_the_queue_wraps_around():
    loss_func = nccl(5)
    rows = torch.nn.functional.normalize(torch.randn(8, OLD), dim=1)
    loss_func.fill(rows[:3] * 4, torch.arange(3))
    assert loss_func.old_queue_labels.tolist() == [0, 1, 2, -1, -1] and int(loss_func.old_queue_count) == 3
    loss_func.fill(rows[3:7], torch.arange(3, 7))
    queue, labels = queue_of(loss_func)
    assert labels == [5, 6, 2, 3, 4]
    torch.testing.assert_close(queue, rows[[5, 6, 2, 3, 4]])
    assert int(loss_func.old_queue_count) == 5 and int(loss_func.old_queue_position) == 2


def test_a_batch_larger_than_the_queue_takes_part_whole_and_its_last_rows_are_kept():
    embeddings, labels, old = batch(n=9)
    small, large = nccl(4), nccl(100)
    torch.testing.assert_close(small(embeddings, labels, ref_emb=old), large(embeddings, labels, ref_emb=old))
    queue, kept = queue_of(small)
    torch.testing.assert_close(queue, torch.nn.functional.normalize(old[-4:], dim=1).float())
    assert kept == labels[-4:].tolist() and int(small.old_queue_count) == 4
    small.fill(np.ones((6, OLD)), np.arange(6))
    assert queue_of(small)[1] == [2, 3, 4, 5]


def test_places_not_yet_filled_take_no_part():
    embeddings, labels, old = batch()
    values = [nccl(size)(embeddings, labels, ref_emb=old).item() for size in (6, 7, 5000)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_label_0_is_a_label_like_others_in_an_unfilled_queue():
    embeddings, _, old = batch()
    loss_func = nccl(100)
    loss_func(embeddings, torch.zeros(6, dtype=torch.long), ref_emb=old)
    naive = NaiveQueue(100)
    naive.add(old, torch.zeros(6, dtype=torch.long))
    feature, _ = naive.terms(embeddings, torch.zeros(6), old, class_weights(loss_func.loss), 0.3)
    assert loss_func.terms["feature_loss"].item() == pytest.approx(feature, rel=1e-6)


def test_eval_mode_reads_the_queue_and_leaves_it():
    embeddings, labels, old = batch()
    loss_func = nccl()
    loss_func.fill(batch(1)[2], batch(1)[1])
    before = copy.deepcopy(loss_func.state_dict())
    in_eval = [loss_func.eval()(embeddings, labels, ref_emb=old) for _ in range(2)]
    assert all(tensor.equal(before[name]) for name, tensor in loss_func.state_dict().items())
    assert in_eval[0] == in_eval[1] == loss_func.train()(embeddings, labels, ref_emb=old)
    assert int(loss_func.old_queue_count) == 12


def test_the_queue_goes_on_where_both_weights_are_0():
    embeddings, labels, old = batch()
    loss_func = nccl(feature_weight=0, logit_weight=0)
    loss = loss_func(embeddings, labels, ref_emb=old)
    torch.testing.assert_close(loss, loss_func.loss(embeddings, labels))
    assert loss_func.terms["feature_loss"] == loss_func.terms["logit_loss"] == 0
    assert int(loss_func.old_queue_count) == 6


def test_a_refused_call_leaves_the_queue():
    embeddings, labels, old = batch()
    loss_func = nccl()
    with pytest.raises(ValueError, match="labels must be in"):
        loss_func(embeddings, labels + CLASSES, ref_emb=old)
    assert int(loss_func.old_queue_count) == 0


def test_filled_beforehand_gives_what_calls_would_have_left():
    calls = [batch(seed) for seed in range(3)]
    called, filled = nccl(10), nccl(10)
    for embeddings, labels, old in calls:
        called(embeddings, labels, ref_emb=old)
    filled.fill(torch.cat([old for *_, old in calls]), torch.cat([labels for _, labels, _ in calls]))
    rows = [sorted(map(tuple, queue_of(loss_func)[0].tolist())) for loss_func in (called, filled)]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-6)


def train(loss_func, steps, optimizer):
    values = []
    for step in steps:
        embeddings, labels, old = batch(step, dtype=torch.float32)
        optimizer.zero_grad()
        loss = loss_func(embeddings, labels, ref_emb=old)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("stop", [1, 2, 5])  # before the queue is full, while it wraps, later
def test_a_resumed_training_goes_on_bit_for_bit(stop):
    loss_func = nccl(10).float()
    optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
    whole = train(loss_func, range(8), optimizer)

    loss_func = nccl(10).float()
    optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
    first = train(loss_func, range(stop), optimizer)
    file = io.BytesIO()
    torch.save((loss_func.state_dict(), optimizer.state_dict()), file)

    resumed = nccl(10).float()
    resumed.loss = task(seed=5).float()
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.1)
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert first + train(resumed, range(stop, 8), optimizer) == whole


def test_state_dict_names():
    expected = {"loss.W", "old_queue", "old_queue_labels", "old_queue_position", "old_queue_count"}
    assert set(nccl().state_dict()) == expected
    assert {name for name, _ in nccl().named_parameters()} == {"loss.W"}


# Gradients.


@pytest.mark.parametrize("term", ["feature_loss", "logit_loss"])
@pytest.mark.parametrize("new", [5, 7, 3])
def test_gradcheck(term, new):
    embeddings, labels, old = batch(n=4, new=new)
    loss_func = nccl(new=new, reducer=reducers.DoNothingReducer()).eval()
    loss_func.fill(batch(1)[2], batch(1)[1])
    assert torch.autograd.gradcheck(lambda e: loss_func(e, labels, ref_emb=old)[term]["losses"], (embeddings,))


def test_the_head_learns_from_the_new_logits_alone():
    """Against an autograd of the plain formula, with the queue's logits detached."""
    embeddings, labels, old = batch()
    loss_func = nccl(feature_weight=0, logit_weight=1.0, temperature=0.3, reducer=reducers.DoNothingReducer())
    found = loss_func(embeddings, labels, ref_emb=old)["logit_loss"]["losses"].mean()
    gradients = torch.autograd.grad(found, [loss_func.loss.W, embeddings])
    unit_rows = torch.nn.functional.normalize
    weights, rows = unit_rows(class_weights(loss_func.loss), dim=1), unit_rows(old, dim=1)
    padded = torch.nn.functional.pad(rows, (0, NEW - OLD))
    z, queued = unit_rows(embeddings @ weights.t(), dim=1), unit_rows(padded @ weights.t(), dim=1).detach()
    positives = (labels[:, None] == labels).double()
    each = -(z @ queued.t() / 0.3).log_softmax(1) * (1 + rows @ rows.t()) / 2 * positives / positives.sum(1)[:, None]
    expected = torch.autograd.grad(each.sum(1).mean(), [loss_func.loss.W, embeddings])
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-9)
        assert other.abs().sum() > 0


def test_nothing_old_gets_a_gradient():
    embeddings, labels, old = batch()
    old.requires_grad_()
    loss_func = nccl()
    loss_func(embeddings, labels, ref_emb=old).backward()
    assert embeddings.grad.abs().sum() > 0 and old.grad is None
    assert not any(buffer.requires_grad for buffer in loss_func.buffers())


def test_two_calls_before_the_backward():
    loss_func = nccl(8)
    first, second = batch(0), batch(1)
    (loss_func(*first[:2], ref_emb=first[2]) + loss_func(*second[:2], ref_emb=second[2])).backward()
    for number, (embeddings, labels, old) in enumerate((first, second)):
        again = nccl(8)
        for other in (first, second)[:number]:
            again.fill(other[2], other[1])
        alone = embeddings.detach().requires_grad_()
        again(alone, labels, ref_emb=old).backward()
        torch.testing.assert_close(embeddings.grad, alone.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", ["equal", "zero_new", "zero_old"])
def test_gradient_is_finite_at_equal_and_zero_rows(case):
    embeddings, labels, old = batch(new=OLD)
    embeddings = (old.clone() if case == "equal" else embeddings.detach().clone()).float()
    embeddings[2] *= case != "zero_new"
    old[3] *= case != "zero_old"
    embeddings.requires_grad_()
    loss = nccl(new=OLD).float()(embeddings, labels, ref_emb=old.float())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(embeddings.grad).all()


def test_old_rows_in_which_no_class_has_a_part():
    """Their logits are rounding, and so is the square of their length, which may be below 0: they stay small."""
    task_loss, n = losses.NormalizedSoftmaxLoss(2, 64), 50
    directions = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        task_loss.W.copy_(directions[:, :2])
    loss_func = NCCLLoss(task_loss, n, embedding_size=64, feature_weight=1.0, logit_weight=1.0, temperature=1.0)
    embeddings = torch.randn(n, 64, requires_grad=True)
    old = torch.randn(n, 62) @ directions[:, 2:].t()
    loss_func(embeddings, torch.arange(n) % 2, ref_emb=old).backward()
    # All similarities are about 0: 50 rows alike, weights (1 + cos) / 2 of about 1/2.
    assert loss_func.terms["logit_loss"].item() == pytest.approx(math.log(n) / 2, rel=0.1)
    assert torch.isfinite(embeddings.grad).all()


# The host.


def test_pair_losses_and_miner_tuples():
    embeddings, labels, old = batch(n=16)
    task_loss = losses.TripletMarginLoss()
    tuples = miners.BatchHardMiner()(embeddings, labels)
    loss_func = NCCLLoss(task_loss, embedding_size=OLD, feature_weight=1.0, logit_weight=0)
    loss_func(embeddings, labels, tuples, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["task_loss"], task_loss(embeddings, labels, tuples).detach())
    assert loss_func.terms["feature_loss"] > 0 and loss_func.terms["logit_loss"] == 0


@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.CosineSimilarity()])
def test_the_task_loss_sees_new_embeddings_alone(distance):
    embeddings, labels, old = batch(n=16, new=OLD)
    positive, negative = (0.8, 0.1) if distance.is_inverted else (0.1, 0.8)
    task_loss = losses.ContrastiveLoss(positive, negative, distance=distance)
    loss_func = NCCLLoss(task_loss, embedding_size=OLD, feature_weight=1.0, logit_weight=0)
    loss_func(embeddings, labels, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["task_loss"], task_loss(embeddings, labels).detach())


def test_reducers_see_one_loss_a_sample():
    embeddings, labels, old = batch()
    plain = nccl(reducer=reducers.DoNothingReducer())(embeddings, labels, ref_emb=old)
    loss_func = nccl(reducer=reducers.SumReducer())
    loss_func(embeddings, labels, ref_emb=old)
    for term in ("feature_loss", "logit_loss"):
        assert plain[term]["losses"].shape == (6,) and plain[term]["indices"].tolist() == list(range(6))
        torch.testing.assert_close(loss_func.terms[term], plain[term]["losses"].sum().detach())


def test_terms_stats_and_regularizer():
    embeddings, labels, old = batch()
    loss_func = nccl(collect_stats=True, embedding_regularizer=regularizers.LpRegularizer())
    loss = loss_func(embeddings, labels, ref_emb=old)
    assert set(loss_func.terms) == {"task_loss", "feature_loss", "logit_loss", "embedding_reg_loss"}
    torch.testing.assert_close(sum(loss_func.terms.values()), loss.detach())
    assert loss_func.feature_loss == pytest.approx(loss_func.terms["feature_loss"].item())
    assert {"feature_weight", "logit_weight", "temperature"} <= set(loss_func._record_these)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_stay_what_they_are(dtype, autocast):
    embeddings, labels, old = batch(dtype=torch.float32)
    loss_func = nccl().float()
    expected = nccl().float()
    expected(embeddings, labels, ref_emb=old)
    before = {name: tensor.dtype for name, tensor in loss_func.state_dict().items()}
    low = embeddings.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_func(low, labels, ref_emb=old.to(dtype))
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    for term in ("feature_loss", "logit_loss"):  # the task loss is PML's, which autocast may round
        found, exact = (loss_func.terms[term].item() for loss_func in (loss_func, expected))
        assert found == pytest.approx(exact, rel=1e-5 if dtype.itemsize > 2 else 0.02)
    after = {name: tensor.dtype for name, tensor in loss_func.state_dict().items()}
    if dtype == torch.float64:  # PML itself turns its weights to float64 for float64 embeddings
        del before["loss.W"], after["loss.W"]
    assert after == before
    torch.testing.assert_close(loss_func.old_queue[:6], torch.nn.functional.normalize(old, dim=1), rtol=0, atol=0.01)


def test_old_embeddings_may_have_another_dtype():
    embeddings, labels, old = batch(dtype=torch.float32)
    expected = nccl().float()(embeddings, labels, ref_emb=old)
    for dtype in (torch.float16, torch.float64):
        loss = nccl().float()(embeddings, labels, ref_emb=old.to(dtype))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-3)


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nccl(0), r"queue_size must be an integer of at least 1, got 0"),
        (lambda: nccl(old=0), r"embedding_size must be an integer of at least 1, got 0"),
        (lambda: nccl(feature_weight=-1), r"feature_weight must be .* at least 0, got -1"),
        (lambda: nccl(logit_weight=math.nan), r"logit_weight must be .* got nan"),
        (lambda: nccl(temperature=0), r"temperature must be .* above 0, got 0"),
        (lambda: NCCLLoss(losses.ArcFaceLoss, embedding_size=OLD), r"loss must be a PML loss object"),
        (
            lambda: NCCLLoss(losses.TripletMarginLoss(), embedding_size=OLD, logit_weight=0.01),
            r"logit_weight must be 0 with a task loss without class weights, got 0.01 and TripletMarginLoss; pass",
        ),
    ],
)
def test_bad_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, y, o: (e, y, None), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, y, o: (e, y, o[:, 1:]), r"ref_emb must be 5 wide, got width 4"),
        (lambda e, y, o: (e, y, o[1:]), r"ref_emb must be shaped like embeddings, .* expected 6 rows, got 5"),
        (lambda e, y, o: (e, y, o * torch.nan), r"ref_emb must be finite, row 0"),
        (lambda e, y, o: (e * torch.inf, y, o), r"embeddings must be finite, row 0"),
        (lambda e, y, o: (e[:0], y[:0], o[:0]), r"embeddings must not be empty"),
        (lambda e, y, o: (e, None, o), r"labels must be given, got None"),
        (lambda e, y, o: (e, y - 4, o), r"labels must be in \[0, 3\], the task loss's classes, got -4"),
        (lambda e, y, o: (e, y, o.to("meta")), r"embeddings must be on the device of ref_emb: got cpu and meta"),
    ],
)
def test_bad_calls(change, message):
    embeddings, labels, old = batch()
    labels[0] = 0
    embeddings, labels, old = change(embeddings, labels, old)
    with pytest.raises(ValueError, match=message):
        nccl()(embeddings, labels, ref_emb=old)


def test_other_ref_labels():
    embeddings, labels, old = batch()
    with pytest.raises(ValueError, match=r"ref_labels must equal labels"):
        nccl()(embeddings, labels, ref_emb=old, ref_labels=(labels + 1) % CLASSES)


def test_wrong_device():
    embeddings, labels, old = batch()
    loss_func = NCCLLoss(losses.ContrastiveLoss(), embedding_size=OLD, logit_weight=0).to("meta")
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        loss_func(embeddings, labels, ref_emb=old)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.ones(2, 4), [0, 1], r"embeddings must be 5 wide, got width 4"),
        (torch.ones(2, 5) * torch.nan, [0, 1], r"embeddings must be finite, row 0"),
        (torch.ones(2, 5), [0], r"labels must have one entry a row: expected 2, got 1"),
        (torch.ones(2, 5), [0, -1], r"labels must be 0 or more, got -1"),
    ],
)
def test_bad_fills(embeddings, labels, message):
    loss_func = nccl()
    with pytest.raises(ValueError, match=message):
        loss_func.fill(embeddings, torch.tensor(labels))
    assert int(loss_func.old_queue_count) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives():
    loss_funcs = nccl(8).float(), nccl(8).float().cuda()
    for seed in range(3):
        embeddings, labels, old = batch(seed, dtype=torch.float32)
        expected = loss_funcs[0](embeddings, labels, ref_emb=old)
        on_gpu = embeddings.detach().cuda().requires_grad_()
        loss = loss_funcs[1](on_gpu, labels, ref_emb=old.cuda())  # labels may stay on the CPU, as in PML
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and torch.isfinite(on_gpu.grad).all()
