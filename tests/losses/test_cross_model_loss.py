import copy
import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import BCTLoss, CompatibleLoss, CrossModelLoss, GatheredLoss, RACTLoss
from pml_compat.miners import BoundaryViolationMiner, CredibleSampleFilter, HardestCrossModelMiner, RegressionMiner
from tests import reference
from tests.pairwise import pairwise
from tests.processes import run_ranks

WIDTH = 4
LABELS = torch.tensor([0, 1, 2, 0, 1, 3])

PAIR_LOSSES = {
    "angular": losses.AngularLoss,
    "circle": losses.CircleLoss,
    "contrastive": losses.ContrastiveLoss,
    "contrastive_cosine": lambda: losses.ContrastiveLoss(1.0, 0.2, distance=distances.CosineSimilarity()),
    "generalized_lifted_structure": losses.GeneralizedLiftedStructureLoss,
    "intra_pair_variance": losses.IntraPairVarianceLoss,
    "lifted_structure": losses.LiftedStructureLoss,
    "margin": losses.MarginLoss,
    "multi_similarity": losses.MultiSimilarityLoss,
    "nca": losses.NCALoss,
    "ntxent": losses.NTXentLoss,
    "signal_to_noise": losses.SignalToNoiseRatioContrastiveLoss,
    "supcon": losses.SupConLoss,
    "triplet": losses.TripletMarginLoss,
    "triplet_cosine": lambda: losses.TripletMarginLoss(0.3, distance=distances.CosineSimilarity()),
    "tuplet": losses.TupletMarginLoss,
}
# Where PML's own gradient is infinite: acos at 1, and a division by the variance of a row of zeros.
CORNERS = {"equal": ["tuplet"], "zero new": ["signal_to_noise"], "zero old": ["signal_to_noise"]}
every_pair_loss = pytest.mark.parametrize("name", PAIR_LOSSES)
NAIVE = ["contrastive", "contrastive_cosine", "triplet", "triplet_cosine", "ntxent", "supcon"]


def samples(seed=0, dtype=torch.float64):
    """Return new embeddings that ask for a gradient, and old ones."""
    new, old = torch.randn(2, len(LABELS), WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return new.requires_grad_(), old


def cosine(a, b):
    return float(reference.unit(a) @ reference.unit(b))


def naive(name, anchors, labels, references, reference_labels):
    """The mean that the loss's own reducer takes, over pairs, triplets or anchors, from the equations."""
    rows, columns = range(len(anchors)), range(len(references))
    s = [[cosine(a, r) for r in references] for a in anchors]
    d = [[math.sqrt(max(0.0, 2 - 2 * x)) for x in row] for row in s]
    pairs = [(i, j) for i in rows for j in columns if labels[i] == reference_labels[j]]
    others = [(i, j) for i in rows for j in columns if labels[i] != reference_labels[j]]
    triplets = [(i, j, k) for i, j in pairs for m, k in others if m == i]

    def mean_of_positive(values):
        values = [v for v in values if v > 0]
        return sum(values) / len(values) if values else 0.0

    if name == "contrastive":
        return mean_of_positive(d[i][j] for i, j in pairs) + mean_of_positive(1 - d[i][j] for i, j in others)
    if name == "contrastive_cosine":
        return mean_of_positive(1 - s[i][j] for i, j in pairs) + mean_of_positive(s[i][j] - 0.2 for i, j in others)
    if name == "triplet":
        return mean_of_positive(d[i][j] - d[i][k] + 0.05 for i, j, k in triplets)
    if name == "triplet_cosine":
        return mean_of_positive(s[i][k] - s[i][j] + 0.3 for i, j, k in triplets)
    if name == "ntxent":
        values = []
        for i, j in pairs:
            logits = [s[i][j]] + [s[i][k] for m, k in others if m == i]
            values.append(reference.cross_entropy([z / 0.07 for z in logits], 0))
        return sum(values) / len(values)
    values = []
    for i in rows:
        own = [j for m, j in pairs if m == i]
        terms = [reference.cross_entropy([z / 0.1 for z in s[i]], j) for j in own]
        values.append(sum(terms) / len(terms) if terms else 0.0)
    return mean_of_positive(values)


@pairwise
@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_naive_loop(name, symmetric, seed):
    new, old = samples(seed)
    y, one, other = LABELS.tolist(), new.detach().numpy(), old.numpy()
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), symmetric=symmetric)
    expected = {"new_to_old_loss": naive(name, one, y, other, y)}
    if symmetric:
        expected = {"new_to_old_loss": expected["new_to_old_loss"] / 2}
        expected["old_to_new_loss"] = naive(name, other, y, one, y) / 2
    assert loss_func(new, LABELS, ref_emb=old).item() == pytest.approx(sum(expected.values()), rel=1e-6)
    assert {key: term.item() for key, term in loss_func.terms.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("symmetric", [False, True])
def test_bank_of_other_rows(name, symmetric):
    new, old = samples()
    bank, bank_labels = torch.cat([old[2:], old * 0.3 + 1, -old]), torch.arange(16) % 5
    y, z, one, other = LABELS.tolist(), bank_labels.tolist(), new.detach().numpy(), bank.numpy()
    expected = naive(name, one, y, other, z)
    if symmetric:
        expected = (expected + naive(name, other, z, one, y)) / 2
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), symmetric=symmetric)
    loss = loss_func(new, LABELS, ref_emb=bank, ref_labels=bank_labels)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert torch.isfinite(new.grad).all() and new.grad.abs().sum() > 0


def test_by_hand():
    # old: two right angles; new: the first item's query lies on the second item's old embedding
    new, old = torch.tensor([[0.0, 2.0], [0.0, 3.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([5, 7])
    triplet = CrossModelLoss(losses.TripletMarginLoss(margin=0.1, reducer=reducers.SumReducer()), symmetric=True)
    triplet(new, labels, ref_emb=old)
    # new to old: d(0,0) = sqrt 2, d(0,1) = 0; the second item is right. Old to new: item 0 ties at sqrt 2, item 1 at 0.
    assert triplet.terms["new_to_old_loss"].item() == pytest.approx((math.sqrt(2) + 0.1) / 2)
    assert triplet.terms["old_to_new_loss"].item() == pytest.approx((0.1 + 0.1) / 2)


@every_pair_loss
@pytest.mark.parametrize("symmetric", [False, True])
def test_own_old_embedding_is_a_positive_however_the_labels_come(name, symmetric):
    new, old = samples()
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), symmetric=symmetric)
    expected = loss_func(new, LABELS, ref_emb=old)
    expected.backward()
    assert torch.isfinite(expected) and new.grad.abs().sum() > 0
    for ref_labels in (LABELS, LABELS.clone(), LABELS.int()):
        assert loss_func(new, LABELS, ref_emb=old, ref_labels=ref_labels) == expected
    if not symmetric:
        assert PAIR_LOSSES[name]()(new, LABELS, ref_emb=old, ref_labels=LABELS.clone()) == expected


def test_distinct_labels_leave_the_own_old_embedding_as_only_positive():
    new, old = samples()
    labels = torch.arange(6)
    loss_func = CrossModelLoss(losses.ContrastiveLoss(neg_margin=0.0))
    apart = (torch.nn.functional.normalize(new) - torch.nn.functional.normalize(old)).norm(dim=1)
    torch.testing.assert_close(loss_func(new, labels, ref_emb=old), apart.mean())


# circle is left out: it stops the gradient of its weights on purpose
@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - {"circle"}))
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck(name, symmetric):
    new, old = samples(seed=3)
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), symmetric=symmetric).double()
    assert torch.autograd.gradcheck(lambda e: loss_func(e, LABELS, ref_emb=old), (new,))


@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n in PAIR_LOSSES for c in ("equal", "zero new", "zero old") if n not in CORNERS[c]]
)
def test_finite_gradient_at_corners(name, case):
    new, old = (rows.detach().float() for rows in samples())
    if case == "equal":
        new[2] = old[2]
    new[2] *= case != "zero new"
    old[2] *= case != "zero old"
    new.requires_grad_()
    loss = CrossModelLoss(PAIR_LOSSES[name](), symmetric=True)(new, LABELS, ref_emb=old)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


@pairwise
@every_pair_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_dtypes(name, dtype, autocast):
    new, old = samples(dtype=torch.float32)
    new = new.detach().to(dtype).requires_grad_()
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), symmetric=True)
    expected = loss_func(new.float(), LABELS, ref_emb=old.to(dtype).float())
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(new, LABELS, ref_emb=old.to(dtype))
    loss.backward()
    assert (
        new.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(new.grad).all()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=4 * torch.finfo(dtype).eps)
    assert all(parameter.dtype == torch.float32 for parameter in loss_func.parameters())


@every_pair_loss
def test_autocast_changes_nothing(name):
    """PML's own cosines would be bfloat16 products."""
    new, old = samples(dtype=torch.float32)
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), miners.MultiSimilarityMiner(), symmetric=True)
    expected = loss_func(new, LABELS, ref_emb=old)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_func(new, LABELS, ref_emb=old) == expected


@pytest.mark.parametrize("symmetric", [False, True])
def test_old_embeddings_get_no_gradient(symmetric):
    new, old = samples()
    old.requires_grad_()
    CrossModelLoss(losses.SupConLoss(), symmetric=symmetric)(new, LABELS, ref_emb=old * 1.0).backward()
    assert old.grad is None and new.grad.abs().sum() > 0


def test_gradient_of_the_symmetric_term_goes_through_the_references():
    new, old = samples()
    loss_func = CrossModelLoss(losses.ContrastiveLoss(), symmetric=True)
    loss_func(new, LABELS, ref_emb=old).backward()
    both, new.grad = new.grad, None
    (losses.ContrastiveLoss()(new, LABELS, ref_emb=old, ref_labels=LABELS.clone()) / 2).backward()
    forward, new.grad = new.grad, None
    (losses.ContrastiveLoss()(old, LABELS, ref_emb=new, ref_labels=LABELS.clone()) / 2).backward()
    assert new.grad.abs().sum() > 0
    torch.testing.assert_close(both, forward + new.grad)


class Recorder(miners.BaseMiner):
    """Hardest triplets; keeps what it was called with."""

    def forward(self, *arguments):
        self.calls = [*getattr(self, "calls", []), arguments]
        return miners.BatchHardMiner()(*arguments)


def test_miner_is_called_with_new_anchors_and_old_references():
    new, old = samples()
    bank, bank_labels = torch.cat([old, -old]), torch.cat([LABELS, LABELS])
    miner = Recorder()
    loss = CrossModelLoss(losses.TripletMarginLoss(), miner)(new, LABELS, ref_emb=bank, ref_labels=bank_labels)
    (called,) = miner.calls
    assert called[0].equal(new) and called[2].equal(bank) and called[1].equal(LABELS) and called[3].equal(bank_labels)
    assert called[1] is not called[3]
    tuples = miners.BatchHardMiner()(new, LABELS, bank, bank_labels)
    expected = losses.TripletMarginLoss()(new, LABELS, tuples, bank, bank_labels)
    assert loss == expected and loss != CrossModelLoss(losses.TripletMarginLoss())(new, LABELS, ref_emb=old)


def test_miner_of_a_symmetric_loss_is_called_both_ways():
    new, old = samples()
    bank, bank_labels = torch.cat([old, -old]), torch.cat([LABELS, LABELS])
    miner = Recorder()
    loss_func = CrossModelLoss(losses.TripletMarginLoss(), miner, symmetric=True)
    loss_func(new, LABELS, ref_emb=bank, ref_labels=bank_labels)
    called = miner.calls[1]
    assert called[0].equal(bank) and called[2].equal(new) and called[1].equal(bank_labels) and called[3].equal(LABELS)
    tuples = miners.BatchHardMiner()(bank, bank_labels, new, LABELS)
    expected = losses.TripletMarginLoss()(bank, bank_labels, tuples, new, LABELS) / 2
    assert loss_func.terms["old_to_new_loss"] == expected


def test_given_tuples_are_used_and_turned_round():
    new, old = samples()
    a, p, n = torch.tensor([0, 0, 3]), torch.tensor([3, 3, 3]), torch.tensor([1, 2, 1])
    loss_func = CrossModelLoss(losses.ContrastiveLoss(reducer=reducers.SumReducer()), symmetric=True)
    loss_func(new, LABELS, (a, p, n), ref_emb=old)
    d = torch.cdist(torch.nn.functional.normalize(new), torch.nn.functional.normalize(old))
    forward = 2 * d[0, 3] + d[3, 3] + sum((1 - d[i, j]).relu() for i, j in [(0, 1), (0, 2), (3, 1)])
    back = d[0, 3] + d[3, 3] + sum((1 - d[i, j]).relu() for i, j in [(0, 1), (0, 2), (3, 1)])  # each pair once
    torch.testing.assert_close(loss_func.terms["new_to_old_loss"], forward.detach() / 2)
    torch.testing.assert_close(loss_func.terms["old_to_new_loss"], back.detach() / 2)


def test_tuples_of_a_miner_that_needs_new_anchors_are_turned_round():
    new, old = samples()
    miner = RegressionMiner()
    a, p, n = miner(new, LABELS, old)
    assert len(a) > 0
    loss_func = CrossModelLoss(losses.ContrastiveLoss(), miner, symmetric=True)
    loss_func(new, LABELS, ref_emb=old)
    pairs = [set(zip(x.tolist(), y.tolist(), strict=True)) for x, y in ((p, a), (n, a))]
    one, other = (torch.tensor(sorted(found)).unbind(1) for found in pairs)
    expected = losses.ContrastiveLoss()(old, LABELS, (*one, *other), new, LABELS.clone()) / 2
    torch.testing.assert_close(loss_func.terms["old_to_new_loss"], expected.detach())


OUR_MINERS = {
    "hardest": lambda old: HardestCrossModelMiner(2),
    "hardest_triplets": lambda old: HardestCrossModelMiner(None, "triplets"),
    "boundary": lambda old: BoundaryViolationMiner(
        ClassCenters.from_embeddings(old.repeat(2, 1) + 0.01 * torch.randn(12, WIDTH), LABELS.repeat(2))
    ),
    "regression": lambda old: RegressionMiner(5),
    "credible": lambda old: CredibleSampleFilter(old, LABELS, miners.MultiSimilarityMiner(), share=0.5),
    "multi_similarity": lambda old: miners.MultiSimilarityMiner(),
    "batch_hard": lambda old: miners.BatchHardMiner(),
    "triplet_margin": lambda old: miners.TripletMarginMiner(),
}


@pytest.mark.parametrize("name", ["angular", "contrastive", "multi_similarity", "nca", "ntxent", "triplet"])
@pytest.mark.parametrize("miner", OUR_MINERS)
def test_losses_with_miners(name, miner):
    new, old = samples(dtype=torch.float32)
    torch.manual_seed(0)
    loss_func = CrossModelLoss(PAIR_LOSSES[name](), OUR_MINERS[miner](old), symmetric=True)
    loss = loss_func(new, LABELS, ref_emb=old)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


def test_nothing_to_learn_from_is_a_zero_with_a_gradient():
    new, old = samples()
    none = CrossModelLoss(losses.TripletMarginLoss(), symmetric=True)(new, torch.zeros(6).long(), ref_emb=old)
    none.backward()
    assert none == 0 and new.grad.equal(torch.zeros_like(new))
    empty = (torch.zeros(0).long(),) * 4
    loss = CrossModelLoss(losses.ContrastiveLoss(), symmetric=True)(new, LABELS, empty, ref_emb=old)
    loss.backward()
    assert loss == 0


def test_the_loss_keeps_its_reducer_and_its_parameters():
    new, old = samples(dtype=torch.float32)
    inner = losses.MarginLoss(num_classes=4, learn_beta=True, reducer=reducers.SumReducer())
    loss_func = CrossModelLoss(inner)
    assert loss_func.loss.reducer.reducers["margin_loss"].__class__ is reducers.SumReducer
    loss = loss_func(new, LABELS, ref_emb=old)
    loss.backward()
    assert [parameter is inner.beta for parameter in loss_func.parameters()] == [True]
    assert inner.beta.grad.abs().sum() > 0
    assert loss == copy.deepcopy(inner)(new, LABELS, ref_emb=old, ref_labels=LABELS.clone())


def test_terms_are_recorded_as_stats():
    new, old = samples()
    loss_func = CrossModelLoss(losses.SupConLoss(), symmetric=True, collect_stats=True)
    assert loss_func.sub_loss_names() == ["new_to_old_loss", "old_to_new_loss"] and loss_func.terms == {}
    loss = loss_func(new, LABELS, ref_emb=old)
    assert loss_func.new_to_old_loss + loss_func.old_to_new_loss == pytest.approx(loss.item())
    assert CrossModelLoss(losses.SupConLoss()).sub_loss_names() == ["new_to_old_loss"]


def test_in_a_compatible_loss():
    new, old = samples()
    both = CompatibleLoss(losses.ContrastiveLoss(), CrossModelLoss(losses.SupConLoss()), 0.5)
    expected = losses.ContrastiveLoss()(new, LABELS) + 0.5 * CrossModelLoss(losses.SupConLoss())(
        new, LABELS, ref_emb=old
    )
    torch.testing.assert_close(both(new, LABELS, ref_emb=old), expected)


def cone(width, seed=0):
    """Return old rows that lie close together, and the root mean square distance of their directions from the mean."""
    rows = torch.eye(WIDTH, dtype=torch.float64)[:1] + width * samples(seed)[1].detach()
    unit = rows / rows.square().sum(1, keepdim=True).sqrt()
    return rows, float((unit - unit.mean(0)).square().sum(1).mean().sqrt())


@pytest.mark.parametrize("kind", [losses.SupConLoss, losses.NTXentLoss])
@pytest.mark.parametrize("wrap", [CrossModelLoss, lambda loss: GatheredLoss(CrossModelLoss(loss)), lambda loss: loss])
@pytest.mark.parametrize("width", [0.01, 10.0])
def test_a_measured_term_is_as_sharp_as_old_embeddings_lie_close(kind, wrap, width):
    new, _ = samples()
    old, spread = cone(width)
    loss_func = CompatibleLoss(losses.ContrastiveLoss(), wrap(kind(temperature=0.2)))
    loss_func(new, LABELS, ref_emb=old)
    expected = CrossModelLoss(kind(temperature=0.2 * spread / 0.6))(new, LABELS, ref_emb=old)
    multiplier = loss_func.balance.weight("old_loss")
    torch.testing.assert_close(loss_func.terms["old_loss"], (multiplier * expected).detach())


def test_losses_of_ours_keep_their_temperature():
    new, _ = samples()
    old, _ = cone(0.1)
    loss_func = CompatibleLoss(losses.ContrastiveLoss(), RACTLoss())
    loss_func(new, LABELS, ref_emb=old)
    expected = loss_func.balance.weight("old_loss") * RACTLoss()(new, LABELS, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["old_loss"], expected.detach())


def test_softness_is_the_losss_own_again_after_a_call_and_with_a_number():
    new, _ = samples()
    old, _ = cone(0.1)
    pair_loss = losses.SupConLoss(temperature=0.2)
    CompatibleLoss(losses.ContrastiveLoss(), CrossModelLoss(pair_loss))(new, LABELS, ref_emb=old)
    assert pair_loss.temperature == 0.2
    with pytest.raises(ValueError, match="ref_"):
        CompatibleLoss(losses.ContrastiveLoss(), CrossModelLoss(pair_loss))(new, LABELS, ref_emb=old[:3])
    assert pair_loss.temperature == 0.2
    loss_func = CompatibleLoss(losses.ContrastiveLoss(), CrossModelLoss(pair_loss), 1.0)
    loss_func(new, LABELS, ref_emb=old)
    expected = CrossModelLoss(pair_loss)(new, LABELS, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["old_loss"], expected.detach())


@pytest.mark.parametrize(
    "loss",
    [
        losses.ArcFaceLoss(4, WIDTH),
        losses.NormalizedSoftmaxLoss(4, WIDTH),
        losses.ProxyAnchorLoss(4, WIDTH),
        losses.ProxyNCALoss(4, WIDTH),
        losses.SoftTripleLoss(4, WIDTH),
        losses.P2SGradLoss(WIDTH, 4),
        BCTLoss(losses.ArcFaceLoss(4, WIDTH), FrozenClassifier(torch.randn(4, WIDTH))),
    ],
)
def test_losses_with_class_weights_are_refused(loss):
    with pytest.raises(ValueError, match=rf"{type(loss).__name__} compares them with its class weights; .* BCTLoss"):
        CrossModelLoss(loss)


WITHOUT_REFERENCES = [
    *("FastAPLoss", "HistogramLoss", "InstanceLoss", "ManifoldLoss", "NPairsLoss", "PNPLoss", "RankedListLoss"),
    *("SmoothAPLoss", "ThresholdConsistentMarginLoss", "VICRegLoss"),
]


@pytest.mark.parametrize("kind", [kind for kind in WITHOUT_REFERENCES if hasattr(losses, kind)])  # not in every PML
def test_losses_without_references_are_refused(kind):
    loss = {"ManifoldLoss": lambda: losses.ManifoldLoss(4), "RankedListLoss": lambda: losses.RankedListLoss(1, 1)}
    with pytest.raises(ValueError, match=f"must take reference embeddings and labels, {kind} does not; take one of"):
        CrossModelLoss(loss.get(kind, getattr(losses, kind))())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CrossModelLoss(torch.nn.MSELoss()),
            r"loss must be a PML loss \(BaseMetricLossFunction\), got MSELoss",
        ),
        (
            lambda: CrossModelLoss(DistributedLossWrapper(losses.SupConLoss())),
            "got DistributedLossWrapper; .*wrap this",
        ),
        (lambda: CrossModelLoss(losses.TripletMarginLoss(swap=True)), "loss must not swap"),
        (lambda: CrossModelLoss(losses.SupConLoss(reducer=reducers.DoNothingReducer())), "got DoNothingReducer; leave"),
        (lambda: CrossModelLoss(losses.SupConLoss(), lambda *_: None), r"miner must be a PML miner .*, got function"),
        (lambda: CrossModelLoss(losses.SupConLoss(), losses.SupConLoss()), r"a PML miner .*, got SupConLoss; tuples"),
        (lambda: CrossModelLoss(losses.SupConLoss(), distance=distances.LpDistance()), "distance must be given to the"),
    ],
)
def test_bad_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("triplets", [False, True])
def test_pairs_that_are_known_need_no_labels(symmetric, triplets):
    torch.manual_seed(0)
    new, old = torch.randn(4, WIDTH, requires_grad=True), torch.randn(5, WIDTH)
    a, p, n = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 1, 2]), torch.tensor([1, 2, 3, 3])
    tuples = (a, p, n) if triplets else (a, p, a, n)
    loss_func = CrossModelLoss(losses.ContrastiveLoss(neg_margin=2), symmetric=symmetric)
    loss = loss_func(new, None, tuples, old)
    positive = torch.nn.functional.normalize(new)[a] - torch.nn.functional.normalize(old)[p]
    negative = torch.nn.functional.normalize(new)[a] - torch.nn.functional.normalize(old)[n]
    torch.testing.assert_close(loss, positive.norm(dim=1).mean() + (2 - negative.norm(dim=1)).relu().mean())
    loss.backward()
    assert torch.isfinite(new.grad).all()
    with pytest.raises(ValueError, match="ref_emb must be given"):
        loss_func(new, None, tuples)
    with pytest.raises(ValueError, match="ref_emb must be finite"):
        loss_func(new, None, tuples, old * torch.nan)
    with pytest.raises(ValueError, match="labels must be given"):
        CrossModelLoss(losses.ContrastiveLoss(), HardestCrossModelMiner())(new, None, tuples, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ref_emb=None), r"ref_emb must be given: the old model's embeddings; got None"),
        (dict(rows=5), "ref_labels must be given where ref_emb has other rows than embeddings, got 5 rows for 6"),
        (dict(ref_emb=torch.full((6, WIDTH), torch.nan)), "ref_emb must be finite, row 0 has a NaN"),
        (dict(ref_emb=torch.zeros(0, WIDTH)), r"ref_emb must not be empty, got shape \(0, 4\)"),
        (dict(ref_emb=torch.zeros(6, WIDTH).long()), "ref_emb must be floating point, got torch.int64"),
        (
            dict(ref_emb=torch.zeros(6, WIDTH, device="meta")),
            "embeddings must be on the device of ref_emb: got cpu and",
        ),
        (dict(embeddings=torch.full((6, WIDTH), torch.inf)), "embeddings must be finite, row 0"),
        (dict(labels=None), "labels must be given, got None"),
        (dict(labels=torch.rand(6)), "labels must be integers, got torch.float32"),
        (dict(ref_labels=torch.rand(6)), "ref_labels must be integers, got torch.float32"),
    ],
)
def test_bad_calls(change, message):
    new, old = samples()
    call = {"embeddings": new, "labels": LABELS, "ref_emb": old[: change.pop("rows", 6), : change.pop("width", 4)]}
    with pytest.raises(ValueError, match=message):
        CrossModelLoss(losses.SupConLoss())(**(call | change))


def test_tuples_beside_a_miner_are_refused():
    new, old = samples()
    pairs = loss_and_miner_utils.get_all_pairs_indices(LABELS, LABELS.clone())
    with pytest.raises(ValueError, match=r"indices_tuple must be None where the loss has a miner, .* efficient off"):
        CrossModelLoss(losses.SupConLoss(), miners.MultiSimilarityMiner())(new, LABELS, pairs, ref_emb=old)


def test_tuples_of_an_efficient_distributed_wrapper_are_refused_and_others_are_not():
    new, old = samples()
    gathered, gathered_labels = torch.cat([old, -old]), torch.cat([LABELS, LABELS])
    pairs = loss_and_miner_utils.get_all_pairs_indices(LABELS, gathered_labels)
    loss_func = CrossModelLoss(losses.SupConLoss())
    expected = loss_func(new, LABELS, ref_emb=gathered, ref_labels=gathered_labels)
    assert loss_func(new, LABELS, pairs, gathered, gathered_labels) == expected
    fewer = loss_and_miner_utils.remove_self_comparisons(pairs, torch.arange(6), 12)
    with pytest.raises(ValueError, match=r"must not leave out each item's own old embedding, .* leave efficient off"):
        loss_func(new, LABELS, fewer, gathered, gathered_labels)
    for chosen in ((fewer[0][1:], fewer[1][1:], *fewer[2:]), (*fewer[:2], fewer[2][1:], fewer[3][1:])):
        loss_func(new, LABELS, chosen, gathered, gathered_labels)  # a miner's or a user's choice


def run_rank(rank, world_size, rendezvous, results):
    """Distinct labels on every rank, and the same labels object for new and old."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    new, old = samples()
    own = new.detach().chunk(world_size)[rank].requires_grad_()
    labels = torch.arange(6).chunk(world_size)[rank]
    efficient = DistributedLossWrapper(CrossModelLoss(losses.ContrastiveLoss()), efficient=True)
    with pytest.raises(ValueError, match="leave efficient off"):
        efficient(own, labels, ref_emb=old.chunk(world_size)[rank])
    found = {}
    for name, miner in (("all", None), ("hardest", HardestCrossModelMiner())):
        for given in (None, labels, labels.clone()):
            loss_func = DistributedLossWrapper(CrossModelLoss(losses.ContrastiveLoss(), miner))
            loss = loss_func(own, labels, ref_emb=old.chunk(world_size)[rank], ref_labels=given)
            found.setdefault(name, []).append(loss.item() / world_size)
    results[rank] = found
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_find_the_positives_that_one_finds(tmp_path):
    results = run_ranks(run_rank, 2, tmp_path)
    new, old = samples()
    for rank in range(2):
        for name, miner in (("all", None), ("hardest", HardestCrossModelMiner())):
            expected = CrossModelLoss(losses.ContrastiveLoss(), miner)(new, torch.arange(6), ref_emb=old).item()
            assert results[rank][name] == pytest.approx([expected] * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("symmetric", [False, True])
def test_gpu_gives_what_the_cpu_gives_wherever_the_labels_are(symmetric):
    new, old = samples()
    for name in NAIVE:
        loss_func = CrossModelLoss(PAIR_LOSSES[name](), symmetric=symmetric)
        expected = loss_func(new, LABELS, ref_emb=old)
        for labels in (LABELS, LABELS.cuda()):
            for ref_labels in (None, LABELS, LABELS.cuda(), labels):
                on_gpu = loss_func(new.cuda(), labels, ref_emb=old.cuda(), ref_labels=ref_labels)
                torch.testing.assert_close(on_gpu.cpu(), expected)
