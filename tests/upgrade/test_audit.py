"""Stored embeddings looked through: each kind of noise is found where it was put, and nowhere else."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.cli.main import main
from pml_compat.serving import alignability
from pml_compat.upgrade import audit

CLASSES, WIDTH = 6, 16


def clouds(n=300, noise=0.15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    centers = 2 * torch.eye(CLASSES, WIDTH)
    return centers[labels] + noise * torch.randn(n, WIDTH, generator=generator), labels


def naive(rows, labels):
    """P@1 of each item among the others, by a loop."""
    unit = normalize(rows.double(), dim=1)
    hits = []
    for i in range(len(unit)):
        scores = unit @ unit[i]
        scores[i] = -2
        hits.append(bool(labels[scores.argmax()] == labels[i]))
    return np.array(hits)


def test_clean_rows_are_kept():
    rows, labels = clouds()
    found = audit(rows, labels)
    assert {reason: len(rows) for reason, rows in found.flagged.items() if len(rows)} == {}
    assert found.keep.all() and found.precision_at_1 == 1.0 and found.audited == found.rows == 300


def test_each_kind_of_noise_is_found_where_it_is():
    rows, labels = clouds()
    rows[3], rows[4, 2], rows[5, 0] = 0, torch.nan, torch.inf
    rows[10], rows[16] = 3 * rows[22], rows[22]  # copies of one item, of the same class
    rows[11] = rows[24]  # of another class
    labels = labels.clone()
    labels[[30, 31]] = (labels[[30, 31]] + 1) % CLASSES
    rows[40] = -rows[40]  # far from everything
    found = audit(rows, labels)
    flagged = {reason: places.tolist() for reason, places in found.flagged.items()}
    assert flagged["zero"] == [3] and flagged["not finite"] == [4, 5]
    assert flagged["copy"] == [16, 22]  # the first of them stays
    assert flagged["contradiction"] == [11, 24]
    assert set(flagged["wrong label"]) - {40} == {11, 30, 31}  # 11 stands among those of another class, too
    assert 40 in flagged["outlier"]
    gone = {3, 4, 5, 16, 22, 11, 24, 30, 31} | set(flagged["wrong label"])
    assert set((~found.keep).nonzero()[:, 0].tolist()) == gone
    assert any(f"Leave {len(gone)} rows out" in sentence for sentence in found.advice)


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_precision_is_that_of_a_loop(noise):
    rows, labels = clouds(n=120, noise=noise)
    found, hits = audit(rows, labels), naive(rows, labels)
    assert found.precision_at_1 == pytest.approx(hits.mean())
    by_class = {int(label): hits[labels.numpy() == label].mean() for label in range(CLASSES)}
    worst = sorted(by_class.items(), key=lambda item: item[1])[:5]
    assert [value for _, value, _ in found.worst] == pytest.approx([value for _, value in worst])
    assert all(by_class[label] == pytest.approx(value) and count == 20 for label, value, count in found.worst)


def test_a_class_that_the_old_model_mixes_up_is_no_witness_against_labels():
    """Its items lie among others', which says nothing of their labels."""
    rows, labels = clouds()
    mixed = labels == 5
    rows[mixed] = rows[labels == 0][torch.randperm(50, generator=torch.Generator().manual_seed(1))] + 0.3 * torch.randn(
        50, WIDTH, generator=torch.Generator().manual_seed(2)
    )
    found = audit(rows, labels)
    assert not set(found.flagged["wrong label"].tolist()) & set(mixed.nonzero()[:, 0].tolist())
    assert found.worst[0][0] == 5


def test_blocks_and_types_change_nothing(monkeypatch):
    rows, labels = clouds(noise=0.6)
    whole = audit(rows, labels)
    monkeypatch.setattr(sys.modules["pml_compat.upgrade.audit"], "_BLOCK", 1000)
    for given, names in ((rows, labels), (rows.numpy(), labels.numpy()), (rows, [f"c{label}" for label in labels])):
        found = audit(given, names)
        assert found.precision_at_1 == whole.precision_at_1
        assert all(torch.equal(found.flagged[reason], whole.flagged[reason]) for reason in whole.flagged)
    assert found.worst[0][0] == f"c{whole.worst[0][0]}"
    half = audit(rows.half(), labels)
    assert half.precision_at_1 == pytest.approx(whole.precision_at_1, abs=0.02)


def test_many_rows_are_sampled():
    rows, labels = clouds()
    rows[::2] = 0
    found = audit(rows, labels, max_rows=100)
    assert found.audited == 100 and found.rows == len(found.keep) == 300
    assert set(found.flagged["zero"].tolist()) <= set(range(0, 300, 2)) and 30 < len(found.flagged["zero"]) < 70


def test_two_models_and_no_labels():
    rows, labels = clouds()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    found = audit(rows, labels, rows @ turn)
    assert found.alignability == pytest.approx(0, abs=1e-5)
    assert found.new_precision_at_1 == found.precision_at_1
    assert any("QueryBlend" in sentence for sentence in found.advice)
    bare = audit(rows, new=torch.randn(300, 4, generator=torch.Generator().manual_seed(0)))
    assert bare.precision_at_1 is bare.centers is None and bare.alignability > 0.1
    assert any("PointAlignmentLoss" in sentence for sentence in bare.advice)
    assert bare.alignability == pytest.approx(
        alignability(rows, torch.randn(300, 4, generator=torch.Generator().manual_seed(0))), abs=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": torch.zeros(5)}, r"old must be \(N, D\) embeddings, got torch.Size\(\[5\]\)"),
        ({"old": torch.zeros(0, 3)}, r"old must be \(N, D\) embeddings"),
        ({"old": torch.zeros(300, 3)}, "old must have two rows of numbers that are not all 0, got 0"),
        ({"labels": torch.zeros(7)}, "labels must have one entry a row: expected 300, got 7"),
        ({"new": torch.zeros(7, 3)}, "new must have a row an item: expected 300, got 7"),
        ({"max_rows": 1}, "max_rows"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    rows, labels = clouds()
    with pytest.raises(ValueError, match=message):
        audit(**({"old": rows, "labels": labels} | change))


def test_command_line(tmp_path, capsys):
    rows, labels = clouds()
    rows[3] = 0
    names = np.array([f"class {label}" for label in labels.tolist()])
    np.savez(tmp_path / "old.npz", embeddings=rows.numpy(), labels=names)
    np.savez(tmp_path / "new.npz", embeddings=rows.numpy()[:, :4])
    out = tmp_path / "out"
    arguments = ["audit", str(tmp_path / "old.npz"), "--new", str(tmp_path / "new.npz"), "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| zero | 1 | of length 0 |" in printed and "alignability" in printed
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "audit.md", "keep.npy"]
    assert json.loads((out / "audit.json").read_text())["flagged"]["zero"] == [3]
    assert np.flatnonzero(~np.load(out / "keep.npy")).tolist() == [3]
    assert main(["audit", str(tmp_path / "none.npz")]) == 3
    assert "there is no" in capsys.readouterr().err
