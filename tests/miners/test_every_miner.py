import copy
import pickle

import pytest
import torch
from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.miners import BaseMiner

from tests.miners.cases import MINERS, WIDTH, samples
from tests.pairwise import pairwise
from tests.reads import Reads

every_miner = pytest.mark.parametrize("name", MINERS)


def same(one, other):
    return len(one) == len(other) and all(a.equal(b) for a, b in zip(one, other, strict=True))


@every_miner
def test_tuples_are_indices_of_positives_and_negatives(name):
    new, labels, old = samples()
    miner = MINERS[name]()
    mined = miner(new, labels, old)
    a1, p, a2, n = mined if len(mined) == 4 else (mined[0], mined[1], mined[0], mined[2])
    assert isinstance(miner, BaseMiner) and len(p) > 0 and len(n) > 0
    assert all(part.dtype == torch.long and part.ndim == 1 for part in mined)
    assert labels[a1].equal(labels[p]) and bool((labels[a2] != labels[n]).all())
    counts = (miner.num_triplets,) if len(mined) == 3 else (miner.num_pos_pairs, miner.num_neg_pairs)
    assert counts == ((len(a1),) if len(mined) == 3 else (len(a1), len(a2)))


@every_miner
def test_labels_of_the_old_embeddings_may_be_any_copy_or_left_out(name):
    new, labels, old = samples()
    miner = MINERS[name]()
    expected = miner(new, labels, old)
    assert bool((expected[0] == expected[1]).any())  # an item's own old embedding is a positive
    for ref_labels in (labels, labels.clone(), labels.int()):
        assert same(miner(new, labels, old, ref_labels), expected)


@every_miner
def test_works_with_pml_losses(name):
    new, labels, old = samples()
    new.requires_grad_()
    mined = MINERS[name]()(new, labels, old)
    for loss_func in (losses.ContrastiveLoss(), losses.TripletMarginLoss(), losses.MultiSimilarityLoss()):
        loss = loss_func(new, labels, mined, old, labels.clone())
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


@every_miner
def test_inputs_are_not_changed_and_no_gradient_is_made(name):
    new, labels, old = samples()
    new.requires_grad_(), old.requires_grad_()
    MINERS[name]()(new, labels, old)
    again = samples()
    assert new.equal(again[0]) and labels.equal(again[1]) and old.equal(again[2])
    assert new.grad is None and old.grad is None


@pairwise
@every_miner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_low_precision_is_mined_in_float32(name, dtype, autocast):
    new, labels, old = samples()
    new, old = new.to(dtype), old.to(dtype)
    miner = MINERS[name]()
    expected = miner(new.float(), labels, old.float())
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert same(miner(new, labels, old), expected)


@every_miner
def test_autocast_changes_nothing(name):
    new, labels, old = (rows.float() if rows.is_floating_point() else rows for rows in samples(n=100))
    miner = MINERS[name](distance=distances.CosineSimilarity())
    expected = miner(new, labels, old)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(miner(new, labels, old), expected)


@every_miner
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda miner: pickle.loads(pickle.dumps(miner))])
def test_copies_and_stats(name, duplicate):
    miner = MINERS[name](collect_stats=True)
    expected = miner(*samples())
    assert same(duplicate(miner)(*samples()), expected)
    assert same(MINERS[name](collect_stats=False)(*samples()), expected)


@every_miner
def test_one_item_and_one_class_are_no_error(name):
    for n in (1, 5):
        new, _, old = samples(n=n)
        mined = MINERS[name]()(new, torch.zeros(n, dtype=torch.long), old)
        assert len(mined[-1]) == 0
        assert all(part.dtype == torch.long for part in mined)


@every_miner
def test_old_tensors_are_buffers(name):
    miner = MINERS[name]()
    assert not list(miner.parameters())
    assert all("old_" in key or key == "label_map.labels" for key in miner.state_dict())


@every_miner
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_emb": None}, "ref_emb must be given: the old model's embeddings; got None"),
        ({"ref_emb": torch.zeros(9, WIDTH)}, "ref_labels must be given where ref_emb has other rows .* got 9 rows for"),
        ({"ref_emb": torch.full((14, WIDTH), torch.nan)}, "ref_emb must be finite, row 0"),
        ({"embeddings": torch.zeros(0, WIDTH)}, "embeddings must not be empty"),
        ({"labels": None}, "labels must be given, got None"),
        ({"labels": torch.zeros(13).long()}, "labels must have one entry a row: expected 14, got 13"),
        ({"ref_labels": torch.zeros(13).long()}, "ref_labels must have one entry a row: expected 14, got 13"),
    ],
)
def test_bad_calls(name, change, message):
    new, labels, old = samples()
    call = {"embeddings": new, "labels": labels, "ref_emb": old} | change
    with pytest.raises(ValueError, match=message):
        MINERS[name]()(**call)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_miner
def test_gpu_gives_what_the_cpu_gives(name):
    new, labels, old = samples()
    miner = MINERS[name]()
    expected = miner(new, labels, old)
    mined = miner.cuda()(new.cuda(), labels, old.cuda())
    assert {part.device.type for part in mined} == {"cuda"}
    assert same([part.cpu() for part in mined], expected)


# What is read for a tuple: how many pairs there are of either sort, and how many triplets these make; how many anchors,
# or references, take part.
READS = {
    "hardest": 2,
    "hardest_triplets": 3,
    "hardest_all": 3,
    "boundary": 3,
    "regression": 2,
    "regression_capped": 3,
    "credible": 3,
    "credible_entropy": 1,
    "credible_regression": 3,
}


@pytest.mark.parametrize("name", MINERS)
def test_no_more_is_read_back_from_the_device_than_a_tuple_needs(name):
    new, labels, old = samples()
    miner = MINERS[name]()
    with Reads() as reads:
        miner(new, labels, old)
    assert reads.ours.total() <= 1  # what is given, looked at once
    assert reads.miners.total() == READS[name], reads.miners
