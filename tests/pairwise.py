"""Fewer cases than the product of a test's factors."""

import itertools

import pytest


def pairwise(test):
    """Cut a test's stacked ``parametrize`` to cases in which any value of one meets any value of any other."""
    factors = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names = [[name] if isinstance(name, str) else list(name) for name, _ in (mark.args for mark in factors)]
    values = [list(mark.args[1]) for mark in factors]
    left = {case: _pairs(case) for case in itertools.product(*(range(len(one)) for one in values))}
    missing, chosen = set().union(*left.values()), []
    while missing:
        chosen.append(max(left, key=lambda case: len(left[case] & missing)))
        missing -= left[chosen[-1]]
    cases = []
    for case in sorted(chosen):
        parts = [one[place] for one, place in zip(values, case, strict=True)]
        cases.append([v for part, own in zip(parts, names, strict=True) for v in (part if len(own) > 1 else [part])])
    test.pytestmark = [mark for mark in test.pytestmark if mark.name != "parametrize"]
    return pytest.mark.parametrize(list(itertools.chain(*names)), cases)(test)


def _pairs(case):
    """The places of the values that a case has, two by two."""
    return set(itertools.combinations(enumerate(case), 2))
