"""The multipliers that are measured, by themselves and in the losses that have them."""

import copy
import io
import pickle

import pytest
import torch
from pytorch_metric_learning import losses

from pml_compat.frozen import FrozenClassifier
from pml_compat.losses import (
    AdvBCTLoss,
    BCAlignerLoss,
    BCTLoss,
    CompatibleLoss,
    FCTLoss,
    LCELoss,
    PointAlignmentLoss,
)
from pml_compat.losses.gradient_balance import GradientBalance
from pml_compat.transformations import LinearTransformation
from tests import reference
from tests.reads import Reads

WIDTH, CLASSES = 5, 4
MEASURED = [*range(1, 11), 17, 33, 49]  # calls


def rows(seed=0, n=8, dtype=torch.float64):
    """Return embeddings, and where the task and the term draw them to."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(3, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return found[0].requires_grad_(), found[1], found[2]


def task_and_term(embeddings, goal, other, touched=slice(None)):
    """Return two losses whose gradients are plain to see, and these gradients, in NumPy."""
    task = (embeddings - goal).square().sum(1).mean()
    term = (embeddings * other)[touched].sum(1).mean()
    given = torch.zeros_like(other)
    given[touched] = other[touched] / len(other[touched])
    return task, term, (2 * (embeddings.detach() - goal) / len(goal)).numpy(), given.numpy()


def balance_of(*calls, names=("term",)):
    balance = GradientBalance(names)
    for task, term, embeddings in calls:
        balance.measure(task, {"term": (term, embeddings, 0)})
    return balance


def weight(balance, name="term"):
    return float(balance.weight(name))


@pytest.mark.parametrize("touched", [slice(None), slice(2, 7, 2), [5]])
@pytest.mark.parametrize("calls", [1, 3])
def test_matches_the_naive_ratio_of_lengths(touched, calls):
    measured, gradients = [], []
    for seed in range(calls):
        embeddings, goal, other = rows(seed)
        task, term, *found = task_and_term(embeddings, goal, other, touched)
        measured.append((task, term, embeddings))
        gradients.append(found)
    assert weight(balance_of(*measured)) == pytest.approx(reference.gradient_balance(gradients), rel=1e-6)


def test_by_hand():
    """Gradients (3, 4) and (0, 0) of the task, (0, 2) and (6, 8) of the term, then (0, 1) and (0, 3) of one row."""
    embeddings = torch.zeros(2, 2, requires_grad=True)
    task, term = (embeddings[0] * torch.tensor([3.0, 4.0])).sum(), (embeddings * torch.tensor([[0, 2], [6, 8.0]])).sum()
    balance = balance_of((task, term, embeddings))
    assert weight(balance) == pytest.approx(5 / 12)
    one = torch.zeros(1, 2, requires_grad=True)
    balance.measure(one[0, 1], {"term": (3 * one[0, 1], one, 0)})
    assert weight(balance) == pytest.approx((5 + 1) / (12 + 3))
    assert (float(balance.task_lengths), float(balance.term_lengths), int(balance.calls)) == (6.0, 15.0, 2)


def test_rows_that_the_term_does_not_touch_do_not_count():
    embeddings, goal, other = rows()
    task, term, *_ = task_and_term(embeddings, goal, other, slice(3))
    far = goal.clone()
    far[3:] *= 1e6
    alike, *_ = task_and_term(embeddings, far, other, slice(3))
    assert weight(balance_of((task, term, embeddings))) == weight(balance_of((alike, term, embeddings)))


def test_each_term_is_compared_on_the_tensor_that_it_draws():
    embeddings, goal, other = rows()
    weights = torch.ones(2, 3, requires_grad=True)
    task = (embeddings - goal).square().sum(1).mean() + 6 * weights.sum()
    balance = GradientBalance(["first", "second"])
    assert balance.is_new
    terms = {"second": (2 * weights[1, 0], weights, 0), "first": ((embeddings * other).sum(), embeddings, 0)}
    balance.measure(task, terms)
    assert not balance.is_new
    assert weight(balance, "second") == pytest.approx(6 * 3**0.5 / 2)
    gradients = (2 * (embeddings.detach() - goal) / 8).numpy(), other.numpy()
    assert weight(balance, "first") == pytest.approx(reference.gradient_balance([gradients]), rel=1e-6)


def test_rows_that_lie_in_columns():
    """As the class weights of most of PML's losses do."""
    weights = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factor = torch.arange(1.0, 16.0).view(WIDTH, 3)
    task, term = (factor * weights).sum(), (2 * weights[:, 0]).sum()
    balance = GradientBalance(["term"])
    balance.measure(task, {"term": (term, weights, 1)})
    assert weight(balance) == pytest.approx(float(factor[:, 0].norm()) / (2 * WIDTH**0.5))


def test_the_first_ten_calls_are_measured_and_every_sixteenth():
    balance, found = GradientBalance(["term"]), []
    for call in range(1, 60):
        embeddings, goal, other = rows()
        task, term, *_ = task_and_term(embeddings, goal, other)
        before = balance.task_lengths.clone()
        balance.measure(call * task, {"term": (term, embeddings, 0)})
        if not balance.task_lengths.equal(before):
            found.append(call)
        assert int(balance.calls) == call
    assert found == MEASURED
    embeddings, goal, other = rows()
    once = weight(balance_of((*task_and_term(embeddings, goal, other)[:2], embeddings)))
    assert weight(balance) == pytest.approx(once * sum(MEASURED) / len(MEASURED), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scale_invariance(factor):
    embeddings, goal, other = rows()
    task, term, *_ = task_and_term(embeddings, goal, other)
    plain = weight(balance_of((task, term, embeddings)))
    assert weight(balance_of((factor * task, term, embeddings))) == pytest.approx(factor * plain, rel=1e-6)
    assert weight(balance_of((task, factor * term, embeddings))) == pytest.approx(plain / factor, rel=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        lambda e, task, term: (task.detach(), term, e),
        lambda e, task, term: (task, term.detach(), e),
        lambda e, task, term: (task, term, e.detach()),
        lambda e, task, term: (0 * task, term, e),
        lambda e, task, term: (task, 0 * term, e),
        lambda e, task, term: (torch.ones(2, requires_grad=True).sum(), term, e),  # of something else
        lambda e, task, term: (task, torch.ones(2, requires_grad=True).sum(), e),
    ],
)
def test_without_a_gradient_the_multiplier_is_1(case):
    embeddings, goal, other = rows()
    assert weight(GradientBalance(["term"])) == 1.0
    task, term, *_ = task_and_term(embeddings, goal, other)
    balance = balance_of(case(embeddings, task, term))
    assert weight(balance) == 1.0 and bool(torch.isfinite(balance.task_lengths).all())
    balance.measure(task, {"term": (term, embeddings, 0)})
    assert weight(balance) > 0 and torch.isfinite(balance.weight("term"))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("spoilt", ["task", "term"])
def test_gradients_that_are_not_finite_do_not_count(value, spoilt):
    embeddings, goal, other = rows()
    task, term, *_ = task_and_term(embeddings, goal, other)
    good = task, term, embeddings
    factors = {"task": (value, 1.0), "term": (1.0, value)}[spoilt]
    bad = task * factors[0], term * factors[1], embeddings
    expected = weight(balance_of(good))
    assert weight(balance_of(bad)) == 1.0
    assert weight(balance_of(bad, good)) == weight(balance_of(good, bad)) == expected


def test_an_overflow_of_one_term_leaves_the_others():
    embeddings, goal, other = rows()
    task, term, *_ = task_and_term(embeddings, goal, other)
    balance = GradientBalance(["bad", "term"])
    balance.measure(task, {"bad": (term * torch.inf, embeddings, 0), "term": (term, embeddings, 0)})
    assert weight(balance, "bad") == 1.0 and weight(balance) == weight(balance_of((task, term, embeddings)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    embeddings, goal, other = rows(dtype=dtype, n=400)
    big = 200 * torch.ones_like(goal)  # 400 gradients 400 * sqrt(5) long add up to more than float16 has
    task, term = (embeddings * big).sum(1).mean() * 400, (embeddings * other).sum(1).mean() * 400
    balance = balance_of((task, term, embeddings))
    assert balance.task_lengths.dtype == balance.term_lengths.dtype == torch.float32
    assert float(balance.task_lengths) == pytest.approx(400 * 200 * 5**0.5, rel=0.01)


def test_no_gradient_is_left_behind_and_none_goes_through_the_multiplier():
    embeddings, goal, other = rows()
    task, term, *_ = task_and_term(embeddings, goal, other)
    balance = balance_of((task, term, embeddings))
    assert embeddings.grad is None and not balance.weight("term").requires_grad
    (task + balance.weight("term") * term).backward()  # the graphs are still there
    assert embeddings.grad.abs().sum() > 0


# Saved, copied.


def train(loss_func, steps):
    values = []
    for step in steps:
        embeddings, goal, _ = rows(step, dtype=torch.float32)
        loss = loss_func(embeddings, torch.arange(8) % CLASSES, ref_emb=goal)
        loss.backward()
        values.append(loss.item())
    return values


def two_terms():
    torch.manual_seed(0)
    task = losses.NormalizedSoftmaxLoss(CLASSES, WIDTH)
    return CompatibleLoss(task, {"a": FCTLoss(), "b": PointAlignmentLoss()}, {"a": None, "b": None})


@pytest.mark.parametrize("stop", [1, 9, 12, 16])  # calls; the 17th is measured
def test_a_resumed_training_goes_on_bit_for_bit(stop):
    whole = train(two_terms(), range(20))
    stopped = two_terms()
    first = train(stopped, range(stop))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    resumed = two_terms()
    train(resumed, range(30, 33))  # what it did before does not matter
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert first + train(resumed, range(stop, 20)) == whole
    names = {"balance.task_lengths", "balance.term_lengths", "balance.calls"}
    assert {name for name in stopped.state_dict() if name.startswith("balance.")} == names
    assert int(resumed.balance.calls) == 20


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_go_on_by_themselves(duplicate):
    loss_func = two_terms()
    train(loss_func, range(12))
    before = loss_func.balance.term_lengths.clone()
    other = duplicate(loss_func)
    expected = train(other, range(12, 20))
    assert loss_func.balance.term_lengths.equal(before) and not other.balance.term_lengths.equal(before)
    assert train(loss_func, range(12, 20)) == expected


# In a loss.


def old_classifier(dtype=torch.float64):
    return FrozenClassifier(torch.eye(3, WIDTH, dtype=dtype), labels=[0, 1, 2], kind="cosine")


def bct(influence=None, dtype=torch.float64):
    torch.manual_seed(0)
    return BCTLoss(losses.NormalizedSoftmaxLoss(CLASSES, WIDTH).to(dtype), old_classifier(dtype), influence)


def gradient_of(loss, embeddings):
    return torch.autograd.grad(loss, embeddings, retain_graph=True)[0].detach()


def test_the_loss_is_the_task_and_the_term_at_the_naive_multiplier():
    loss_func, labels, calls = bct(), torch.arange(8) % CLASSES, []
    for seed in range(3):
        embeddings, *_ = rows(seed)
        known = labels < 3
        task = loss_func.loss(embeddings, labels)
        term = (1 - torch.nn.functional.cosine_similarity(embeddings, torch.eye(4, WIDTH).double()[labels]))[known]
        gradients = gradient_of(task, embeddings), gradient_of(term.mean(), embeddings)
        calls.append([gradient.numpy() for gradient in gradients])
        multiplier = reference.gradient_balance(calls)
        loss = loss_func(embeddings, labels)
        assert loss.item() == pytest.approx((task + multiplier * term.mean()).item(), rel=1e-6)
        loss.backward()
        torch.testing.assert_close(embeddings.grad, gradients[0] + multiplier * gradients[1], rtol=1e-5, atol=1e-8)


def test_the_scale_of_the_task_loss_is_the_scale_of_the_whole():
    class Scaled(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.loss, self.factor = losses.ContrastiveLoss(neg_margin=3), factor

        def forward(self, *arguments):
            return self.factor * self.loss(*arguments)

    found = []
    for factor in (1.0, 1000.0):
        embeddings, *_ = rows()
        loss = BCTLoss(Scaled(factor), old_classifier())(embeddings, torch.arange(8) % CLASSES)
        loss.backward()
        found.append((loss.detach(), embeddings.grad))
    torch.testing.assert_close(found[1][0], 1000 * found[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][1], 1000 * found[0][1], rtol=1e-5, atol=1e-8)


def test_without_gradients_nothing_is_measured():
    loss_func, (embeddings, *_) = bct(), rows()
    labels = torch.arange(8) % CLASSES
    with torch.no_grad():
        loss_func(embeddings, labels)
    assert loss_func.balance.is_new
    _, term = loss_func.terms.values()
    expected = loss_func.old_classifier.direction_losses(embeddings, labels)[0][labels < 3].mean()
    torch.testing.assert_close(term, expected.detach())


def test_eval_mode_measures_once_where_nothing_is_measured_and_never_again():
    loss_func, labels = bct().eval(), torch.arange(8) % CLASSES
    values = [loss_func(rows(seed)[0], labels).item() for seed in (0, 1, 0)]
    assert int(loss_func.balance.calls) == 1 and values[0] == values[2]
    assert values[0] == bct()(rows()[0], labels).item()


def test_a_number_leaves_the_balance_alone():
    loss_func, labels = bct(0.5), torch.arange(8) % CLASSES
    loss_func(rows()[0], labels)
    assert loss_func.balance.is_new and int(loss_func.balance.calls) == 0
    loss_func.influence_weight = None  # at any time
    loss_func(rows()[0], labels)
    assert loss_func(rows()[0], labels).item() == pytest.approx(bct()(rows()[0], labels).item(), rel=1e-6)


def test_terms_with_a_number_keep_it_beside_one_that_is_balanced():
    embeddings, goal, _ = rows()
    torch.manual_seed(0)
    task = losses.NormalizedSoftmaxLoss(CLASSES, WIDTH).double()
    loss_func = CompatibleLoss(task, {"a": FCTLoss(), "b": PointAlignmentLoss()}, {"a": None, "b": 0.5})
    loss_func(embeddings, torch.arange(8) % CLASSES, ref_emb=goal)
    assert loss_func.balance.names == ["a"]
    torch.testing.assert_close(loss_func.terms["b"], 0.5 * PointAlignmentLoss()(embeddings, ref_emb=goal).detach())
    expected = loss_func.balance.weight("a") * FCTLoss()(embeddings, ref_emb=goal)
    torch.testing.assert_close(loss_func.terms["a"], expected.detach(), rtol=1e-6, atol=0)
    assert CompatibleLoss(task, FCTLoss(), 0.5).balance is None


def test_a_measurement_leaves_no_gradient_on_the_class_weights():
    loss_func, (embeddings, *_) = bct(), rows()
    loss = loss_func(embeddings, torch.arange(8) % CLASSES)
    assert loss_func.loss.W.grad is None and embeddings.grad is None
    loss.backward()
    assert loss_func.loss.W.grad.abs().sum() > 0


MAPPED = {
    "LCE, backward": lambda task, old: LCELoss(task, old, backward_transformation=map_of(4, 3)),
    "LCE, forward": lambda task, old: LCELoss(task, old, forward_transformation=map_of(3, 4)),
    "BCAligner": lambda task, old: BCAlignerLoss(task, map_of(4, 3)),
    "AdvBCT": lambda task, old: CompatibleLoss(task, AdvBCTLoss(old, hidden_features=6), class_weight_length=0.1),
}


def map_of(width, out):
    return LinearTransformation(width, out)


def gradients_of_mapped(name, multiplier=None):
    """Return the gradients of embeddings and of what a term alone trains, at its multiplier or at a given one."""
    torch.manual_seed(0)
    labels, old = torch.arange(8) % CLASSES, torch.randn(8, 4 if name == "AdvBCT" else 3)
    loss_func = MAPPED[name](losses.ArcFaceLoss(CLASSES, 4), (old, labels))
    embeddings = torch.randn(8, 4, requires_grad=True)
    if name == "AdvBCT":
        loss_func.old_losses.old_loss.set_progress(0.5)
    references = {} if name.startswith("LCE") else {"ref_emb": old}
    loss_func(embeddings, labels, **references)  # measures
    if multiplier is not None:
        loss_func.balance.term_lengths.copy_(loss_func.balance.task_lengths / multiplier)
    loss_func.eval()
    loss_func(embeddings, labels, **references).backward()
    others = [own.grad for key, own in loss_func.named_parameters() if not key.startswith("loss.")]
    return embeddings.grad, torch.cat([gradient.flatten() for gradient in others]), loss_func


@pytest.mark.parametrize("name", MAPPED)
def test_what_a_term_alone_trains_gets_its_gradient_without_the_multiplier(name):
    measured, own, loss_func = gradients_of_mapped(name)
    single, own_at_1, _ = gradients_of_mapped(name, 1.0)
    double, own_at_2, _ = gradients_of_mapped(name, 2.0)
    assert own.abs().sum() > 0
    torch.testing.assert_close(own, own_at_1, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own_at_2, own_at_1, rtol=1e-4, atol=1e-6)
    multiplier = loss_func.balance.weight(loss_func.balance.names[-1])
    assert not 0.9 < multiplier < 1.1
    term = double - single  # of the embeddings, at a multiplier of 1
    torch.testing.assert_close(measured, single + (multiplier - 1) * term, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MAPPED)
def test_a_map_is_called_without_gradients_too(name):
    with torch.no_grad():
        torch.manual_seed(0)
        labels, old = torch.arange(8) % CLASSES, torch.randn(8, 4 if name == "AdvBCT" else 3)
        loss_func = MAPPED[name](losses.ArcFaceLoss(CLASSES, 4), (old, labels))
        references = {} if name.startswith("LCE") else {"ref_emb": old}
        assert loss_func(torch.randn(8, 4), labels, **references).isfinite()


def test_nothing_more_is_read_back_from_the_device_than_with_a_number():
    found = []
    for influence in (None, 1.0):
        loss_func, labels = bct(influence, torch.float32), torch.arange(8) % CLASSES
        embeddings, *_ = rows(dtype=torch.float32)
        with Reads() as reads:
            for _ in range(3):
                loss_func(embeddings, labels).backward()
        found.append(reads.found)
    assert int(loss_func.balance.calls) == 0 and found[0]["tolist"] == 3  # the checks of what is given
    assert all(count <= found[1].get(name, 0) for name, count in found[0].items()), found
    balance, (embeddings, goal, other) = GradientBalance(["term"]), rows()
    task, term, *_ = task_and_term(embeddings, goal, other)
    with Reads() as reads:
        balance.measure(task, {"term": (term, embeddings, 0)})
        balance.weight("term")
    assert reads.found == {}
