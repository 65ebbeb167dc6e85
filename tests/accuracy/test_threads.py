"""Work in threads of our own, and torch's number of them."""

import threading

import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator, compiled, threads
from pml_compat.accuracy.calculator import RANK_METRICS


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads(four_threads):
    barrier = threading.Barrier(4, timeout=30)

    def work(number):
        barrier.wait()  # four are at work at once, or this would break
        assert torch.get_num_threads() == 1
        assert threads.thread_count() == 4
        return number

    assert list(threads.in_threads(work, range(8), 4)) == list(range(8))
    assert torch.get_num_threads() == 4


def test_items_are_not_taken_far_ahead(four_threads):
    taken = []
    found = threads.in_threads(lambda number: number, (taken.append(n) or n for n in range(100)), 4)
    assert next(found) == 0
    assert len(taken) <= 6
    found.close()
    assert torch.get_num_threads() == 4


def test_an_error_reaches_the_caller_and_torch_has_its_threads_again(four_threads):
    def work(number):
        if number == 3:
            raise RuntimeError("three")
        return number

    with pytest.raises(RuntimeError, match="three"):
        list(threads.in_threads(work, range(100), 4))
    assert torch.get_num_threads() == 4


def test_two_at_a_time(four_threads):
    """The one that ends first leaves the other its threads, and the last gives torch back its own."""
    one, other = (threads.in_threads(abs, range(20), 2) for _ in range(2))
    next(one), next(other)
    assert list(one) and torch.get_num_threads() == 1
    assert list(other) and torch.get_num_threads() == 4


def test_a_number_that_the_user_sets_meanwhile_stays(four_threads):
    found = threads.in_threads(abs, range(20), 2)
    next(found)
    torch.set_num_threads(3)
    assert len(list(found)) == 19
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(compiled.kernels() is None, reason="needs numba (extra fast)")
@pytest.mark.parametrize("include", [RANK_METRICS, ("precision_at_1",)])
def test_metrics_do_not_depend_on_the_number_of_threads(include, four_threads, monkeypatch):
    monkeypatch.setattr(compiled, "_WORTH_IT", 0)
    monkeypatch.setattr(compiled, "_ROWS", 100)
    monkeypatch.setattr(compiled, "_TILE_ROWS", 40)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (900,), generator=generator)
    rows = torch.randn(20, 16, generator=generator)[labels] + torch.randn(900, 16, generator=generator)
    found = []
    with torch.inference_mode():
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            calculator = CrossModelAccuracyCalculator(include, device="cpu")
            found.append(calculator.get_per_query_accuracy(rows[:700], labels[:700], rows, labels))
            assert torch.get_num_threads() == count
    for other in found[1:]:
        for name in include:
            torch.testing.assert_close(other[name], found[0][name], rtol=2e-3, atol=0, equal_nan=True)
            assert float(other[name].nanmean()) == pytest.approx(float(found[0][name].nanmean()), rel=1e-5)
