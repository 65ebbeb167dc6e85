import math

import pytest
import torch

from pml_compat.transformations.selection import hold_out, is_better, retrieval_scores
from tests.pairwise import pairwise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("n", "classes", "judged"),
    [(20, None, 10), (100, None, 10), (538, None, 54), (45000, None, 2000), (538, 10, 54), (538, 1, 54), (600, 30, 60)],
)
def test_how_many_rows_are_left_out(n, classes, judged):
    labels = None if classes is None else torch.arange(n) % classes
    training, held_out = hold_out(n, labels, generator())
    assert len(held_out) == judged and len(training) == n - judged
    assert torch.cat([training, held_out]).sort().values.equal(torch.arange(n))


def test_whole_classes_are_left_out():
    labels = torch.arange(60_000) % 25
    training, judged = hold_out(len(labels), labels, generator())
    left_out = set(labels[judged].tolist())
    assert len(left_out) == 3 and not left_out & set(labels[training].tolist())
    assert len(judged) == 2000 and len(training) == 60_000 - 3 * 2400
    other = hold_out(len(labels), labels, generator(1))[1]
    assert set(labels[other].tolist()) != left_out


@pytest.mark.parametrize(("n", "labels"), [(1, None), (19, None), (40, torch.arange(40))])
def test_too_few_rows_to_judge_by(n, labels):
    training, judged = hold_out(n, labels, generator())
    assert training.equal(torch.arange(n)) and len(judged) == 0


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("n", [4, 30])
def test_scores_match_a_loop(seed, labelled, n):
    target, mapped = torch.randn(2, n, 5, generator=generator(seed))
    labels = torch.randint(3, (n,), generator=generator(seed)) if labelled else None
    expected = []
    for i in range(n):
        cosine = torch.nn.functional.cosine_similarity
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(cosine(target[i], mapped[j], dim=0)))
        found = others[:10]
        right = [
            float(labels[j] == labels[i]) if labelled else float(cosine(target[i], target[j], dim=0)) for j in found
        ]
        expected.append(sum(right) / len(right))
    torch.testing.assert_close(retrieval_scores(target, mapped, labels), torch.tensor(expected))


def test_labels_that_no_two_rows_share_do_not_count():
    target, mapped = torch.randn(2, 30, 5, generator=generator())
    assert retrieval_scores(target, mapped, torch.arange(30)).equal(retrieval_scores(target, mapped, None))


@pytest.mark.parametrize("errors", [1.0, 2.0])
def test_better_by_standard_errors(errors):
    """Differences of 0.1 and 0.3: a mean of 0.2, a standard error of 0.1 / sqrt(3)."""
    start = torch.zeros(4)
    gains = torch.tensor([0.1, 0.3, 0.1, 0.3])
    error = gains.double().std().item() / 2
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert is_better(gains, start, errors)
    assert not is_better(start, gains, errors) and not is_better(start, start, errors)
    assert is_better(gains - 0.2 + (errors + 0.01) * error, start, errors)
    assert not is_better(gains - 0.2 + (errors - 0.01) * error, start, errors)
