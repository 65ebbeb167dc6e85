import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_compat import __version__
from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.cli import estimate, evaluate
from pml_compat.cli.main import main
from pml_compat.serving import QueryBlend
from pml_compat.transformations import LinearTransformation
from pml_compat.upgrade import backfill_curve, negative_flips, pair_criterion, paired_bootstrap
from pml_compat.verification import verification

ROOT = Path(__file__).parents[2]
METRICS = ("precision_at_1", "mean_average_precision")
CLASSES, WIDTH = 6, 5


def noisy(labels, noise, seed, turn=0):
    """Class centres and noise; models with another ``turn`` have nothing in common."""
    centers = np.random.default_rng(turn).normal(size=(CLASSES, WIDTH))
    rng = np.random.default_rng(seed)
    return (centers[labels] + noise * rng.normal(size=(len(labels), WIDTH))).astype(np.float32)


RNG = np.random.default_rng(1)
QUERY_LABELS, GALLERY_LABELS = RNG.integers(0, CLASSES, 90), RNG.integers(0, CLASSES, 120)
ARRAYS = {
    "new_q": (noisy(QUERY_LABELS, 0.2, 2, turn=9), QUERY_LABELS),
    "fit_q": (noisy(QUERY_LABELS, 0.2, 2), QUERY_LABELS),  # a new model in the old space
    "old_q": (noisy(QUERY_LABELS, 1.0, 3), QUERY_LABELS),
    "old_g": (noisy(GALLERY_LABELS, 1.0, 4), GALLERY_LABELS),
    "new_g": (noisy(GALLERY_LABELS, 0.2, 5, turn=9), GALLERY_LABELS),
}


def unit(array):
    return torch.nn.functional.normalize(torch.from_numpy(array), dim=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    for name, (embeddings, labels) in ARRAYS.items():
        np.savez(folder / f"{name}.npz", embeddings=embeddings, labels=labels)
        np.save(folder / f"{name}.npy", embeddings)
    np.save(folder / "query_labels.npy", QUERY_LABELS)
    np.save(folder / "gallery_labels.npy", GALLERY_LABELS)
    return folder


def command(files, out, *, queries="new_q.npz", gallery="old_g.npz", **options):
    arguments = ["evaluate", "--queries", str(files / queries), "--gallery", str(files / gallery), "--out", str(out)]
    for name, value in options.items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments += [str(files / value) if isinstance(value, str) else str(value)]
    return arguments


EVERYTHING = {"old_queries": "old_q.npz", "new_gallery": "new_g.npz"}


@pytest.fixture(scope="module")
def out(files, one_thread):
    assert main(command(files, files / "out", **EVERYTHING, fars=0.05)) == 0
    return files / "out"


@pytest.fixture(scope="module")
def metrics(out):
    return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_writes_these_files_and_no_others(out):
    assert {file.name for file in out.iterdir()} == {"metrics.json", "report.md", "report.html"}
    assert not list(out.parent.glob(".out*"))


def test_metrics_are_those_of_the_calculator(metrics):
    calculator = CrossModelAccuracyCalculator()
    arrays = {name: unit(embeddings) for name, (embeddings, _) in ARRAYS.items()}
    of_models = ["old_to_old", "new_to_old", "new_to_new", "old_to_new"]
    at_query_time = ["rotated_to_old", "blended_to_old", "two_stages_10", "two_stages_50"]
    assert list(metrics["pairs"]) == of_models + at_query_time
    for pair in of_models:
        found = metrics["pairs"][pair]
        query, gallery = pair.split("_to_")
        names = [name for name in found if name != "cmc"]
        expected = calculator.get_accuracy(
            arrays[f"{query}_q"], QUERY_LABELS, arrays[f"{gallery}_g"], GALLERY_LABELS, include=names
        )
        assert {name: found[name] for name in names} == pytest.approx(expected)
        assert len(found["cmc"]) == 100
        for places, name in ((1, "precision_at_1"), (5, "cmc_top_5"), (10, "cmc_top_10")):
            assert found["cmc"][places - 1] == pytest.approx(found[name]), places
        assert found["cmc"] == sorted(found["cmc"]) and found["cmc"][-1] <= 1


def test_differences_flips_criterion_and_backfill(metrics):
    old_q, old_g, new_q, new_g = (unit(ARRAYS[name][0]) for name in ("old_q", "old_g", "new_q", "new_g"))
    per_query = CrossModelAccuracyCalculator(include=METRICS).get_per_query_accuracy
    old = per_query(old_q, QUERY_LABELS, old_g, GALLERY_LABELS)
    new = per_query(new_q, QUERY_LABELS, new_g, GALLERY_LABELS)
    for metric in METRICS:
        expected = paired_bootstrap(old[metric], new[metric], groups=QUERY_LABELS)
        found = metrics["differences"]["new_to_new"][metric]
        assert (found["estimate"], found["low"], found["high"]) == pytest.approx(
            (expected.estimate, expected.low, expected.high)
        )
    flips = negative_flips(old["precision_at_1"], new["precision_at_1"], torch.from_numpy(QUERY_LABELS))
    found = metrics["negative_flips"]["new_to_new"]
    assert (found["rate"], found["positive_rate"]) == pytest.approx((flips.rate, flips.positive_rate))
    assert found["worst"] == [one._asdict() for one in flips.worst()]
    labels = torch.from_numpy(QUERY_LABELS), torch.from_numpy(GALLERY_LABELS)
    criterion = pair_criterion(old_q, new_q, labels[0], old_g, labels[1])
    assert metrics["criterion"]["same_label"] == pytest.approx(criterion.same_label)
    assert metrics["criterion"]["n_different_label"] == criterion.n_different_label
    curves = [backfill_curve(new_q, labels[0], old_g, new_g, labels[1], seed=seed) for seed in range(5)]
    (start,) = metrics["backfill"]
    assert start == "old"
    for metric in METRICS:
        assert metrics["backfill"]["old"]["values"][metric] == pytest.approx(
            np.mean([curve.values[metric] for curve in curves], 0)
        )
        assert metrics["backfill"]["old"]["area"][metric] == pytest.approx(
            np.mean([curve.area(metric) for curve in curves])
        )
        assert len(metrics["backfill"]["old"]["differences"][metric]) == 11
    assert metrics["backfill"]["old"]["vectors"] == list(range(0, 121, 12))


def test_verification(metrics):
    old_q, old_g, new_q, new_g = (unit(ARRAYS[name][0]) for name in ("old_q", "old_g", "new_q", "new_g"))
    labels = torch.from_numpy(QUERY_LABELS), torch.from_numpy(GALLERY_LABELS)
    old = verification(old_q, labels[0], old_g, labels[1], fars=0.05)
    new = verification(new_q, labels[0], new_g, labels[1], fars=0.05, thresholds=old.thresholds)
    assert list(metrics["verification"]) == ["old_to_old", "new_to_old", "new_to_new"]
    assert metrics["verification"]["old_to_old"]["at_far"]["0.05"]["tar"] == old.at_far[0.05].tar
    assert metrics["verification"]["new_to_new"]["at_far"]["0.05"]["tar"] == new.at_far[0.05].tar
    assert metrics["verification"]["new_to_new"]["at_old_threshold"]["0.05"]["far"] == new.at_threshold[0.05].far


def test_data_and_verdict(metrics, files):
    assert metrics["pml_compat"] == __version__
    data = metrics["data"]
    assert (data["queries"], data["gallery"], data["scored_queries"], data["classes"]) == (90, 120, 90, CLASSES)
    assert (data["normalized"], data["same_items"], data["cameras"]) == (True, None, False)
    assert data["files"]["new_gallery"] == str(files / "new_g.npz")
    verdict = metrics["verdict"]
    expected = {  # the blend's interval ends next to 0: another processor may round it below
        "blend_queries": ("blended_to_old", "Blend old and new queries"),
        "search_in_two_stages": ("two_stages_10", "Search in two stages, 10 items a query"),
    }
    assert (verdict["pair"], verdict["title"]) == expected[verdict["outcome"]]
    assert verdict["reasons"][-1].startswith("Where the old model is not to run any more: backfill ")


def test_an_old_model_that_retires_is_neither_blended_nor_asked_first(files, tmp_path):
    found = measured(files, tmp_path, **EVERYTHING, retire_old_model=True)
    assert list(found["pairs"]) == ["old_to_old", "new_to_old", "new_to_new", "old_to_new"]
    verdict = found["verdict"]
    assert verdict["outcome"] == "backfill_first"
    assert verdict["vectors"] == round(verdict["share"] * 120)
    assert found["negative_flips"]["backfill"]["queries"] == 90


def test_a_blend_of_ones_own(files, tmp_path, capsys):
    old, new = (torch.from_numpy(ARRAYS[name][0]) for name in ("old_g", "new_g"))
    blend = QueryBlend().fit(old, new)
    blend.share = 1.0
    blend.save(files / "blend.safetensors")
    found = measured(files, tmp_path, **EVERYTHING, blend="blend.safetensors", depths=3)
    assert found["data"]["files"]["blend"] == str(files / "blend.safetensors")
    assert found["pairs"]["blended_to_old"] == found["pairs"]["rotated_to_old"]
    assert [pair for pair in found["pairs"] if pair.startswith("two")] == ["two_stages_3"]
    for options in ({"blend": "old_q.npy"}, {"blend": "blend.safetensors", "retire_old_model": True}):
        assert main(command(files, tmp_path / "none", **EVERYTHING, **options)) == 3
        assert "--blend" in capsys.readouterr().err


class Page(HTMLParser):
    """Collects tags, attributes, ids and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(out, metrics):
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert (
        page.tags.count("svg")
        == page.tags.count("figure")
        == 3 + bool(metrics["negative_flips"]["two_stages_10"]["worst"])
    )
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 10
    wanted = {value[1:] for key, value in page.attributes if key == "href"}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted and wanted <= set(ids)
    assert "currentColor" in text and "#010203" not in text and "prefers-color-scheme: dark" in text
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    said = " ".join(page.text.split())
    for sentence in (metrics["verdict"]["title"], *metrics["verdict"]["reasons"], "old/old", "new/new", "Verification"):
        assert " ".join(sentence.split()) in said


def test_markdown_report(out, metrics):
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"## {metrics['verdict']['title']}\n" in report
    for sentence in (metrics["verdict"]["summary"], *metrics["verdict"]["reasons"]):
        assert sentence in report
    accuracies = (100 * metrics["pairs"]["old_to_old"][metric] for metric in METRICS)
    assert "| old/old | {:.1f} | {:.1f} |  |  |  |".format(*accuracies) in report
    assert "## Backfill in random order" in report and "| 50% | 60 | " in report


def measured(files, tmp_path, **options):
    status = main(command(files, tmp_path / "out", **options))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert status == {None: 2, "not_enough_queries": 2, "do_not_upgrade": 1}.get(found["verdict"]["outcome"], 0)
    return found


def accuracies(metrics, pair):
    return {name: value for name, value in metrics["pairs"][pair].items() if name != "cmc"}


def test_npy_files_say_the_same(files, tmp_path, metrics, capsys):
    npy = {"queries": "new_q.npy", "gallery": "old_g.npy", "old_queries": "old_q.npy", "new_gallery": "new_g.npy"}
    labels = {"query_labels": "query_labels.npy", "gallery_labels": "gallery_labels.npy"}
    found = measured(files, tmp_path, **npy, **labels, fars=0.05)
    for key in ("pairs", "differences", "backfill", "verdict"):
        assert found[key] == metrics[key]
    streams = capsys.readouterr()
    assert "51 rankings of 90 queries on 120 vectors: about " in streams.err and "of memory" in streams.err
    assert "ranking: 100%" in streams.err
    printed = " ".join(streams.out.split())
    assert "new/old" in printed and found["verdict"]["title"] in printed and "Written to" in printed


def test_a_model_that_fits_swaps_now(files, tmp_path):
    found = measured(files, tmp_path, queries="fit_q.npz", old_queries="old_q.npz")
    assert (found["verdict"]["outcome"], found["verdict"]["certain"]) == ("swap_now", True)
    assert found["backfill"] == {} and found["update_gain"] == {} and found["verification"] is None


def test_numbers_alone_without_old_queries(files, tmp_path):
    found = measured(files, tmp_path)
    assert list(found["pairs"]) == ["new_to_old"]
    assert found["verdict"]["outcome"] is None and found["criterion"] is None
    assert found["verdict"]["missing"][0].startswith("Give --old-queries")
    assert found["differences"] == found["negative_flips"] == {}
    assert Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).tags.count("svg") == 1


def test_no_verdict_on_a_backfill_without_old_queries(files, tmp_path):
    found = measured(files, tmp_path, new_gallery="new_g.npz")
    assert list(found["pairs"]) == ["new_to_old", "new_to_new"]
    assert found["backfill"]["old"]["differences"] == {}
    assert Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).tags.count("svg") == 3


def test_transformation_and_transformed_gallery_say_the_same(files, tmp_path):
    source, target = ARRAYS["old_g"][0], ARRAYS["new_g"][0]
    transformation = LinearTransformation(WIDTH, WIDTH)
    transformation.fit(torch.from_numpy(source), torch.from_numpy(target), ridge=1e-3)
    transformation.save(files / "map.safetensors")
    np.save(files / "mapped.npy", transformation.apply_to(source, progress=False))
    by_map = measured(files, tmp_path / "a", old_queries="old_q.npz", transformation="map.safetensors")
    by_file = measured(files, tmp_path / "b", old_queries="old_q.npz", transformed_gallery="mapped.npy")
    assert accuracies(by_map, "new_to_transformed_old") == pytest.approx(accuracies(by_file, "new_to_transformed_old"))
    assert by_map["verdict"]["outcome"] == by_file["verdict"]["outcome"]


def test_same_items_are_left_out(files, tmp_path, capsys):
    options = {"queries": "new_g.npz", "gallery": "old_g.npz", "old_queries": "old_g.npz", "new_gallery": "new_g.npz"}
    found = measured(files, tmp_path, **options, same_items=True)
    old = unit(ARRAYS["old_g"][0])
    expected = CrossModelAccuracyCalculator(include=METRICS).get_accuracy(
        old, GALLERY_LABELS, old, GALLERY_LABELS, ref_includes_query=True
    )
    assert {metric: found["pairs"]["old_to_old"][metric] for metric in METRICS} == pytest.approx(expected)
    assert found["data"]["same_items"] == "position" and found["notes"] == []
    assert main(command(files, tmp_path / "leaked", **options)) == 3
    assert "queries must not be gallery items" in (error := capsys.readouterr().err) and "(--same-items)" in error


def test_one_labels_file_serves_queries_and_gallery_of_the_same_items(files, tmp_path):
    options = {"gallery": "old_g.npy", "labels": "gallery_labels.npy", "same_items": True}
    found = measured(files, tmp_path, queries="new_g.npy", **options)
    again = measured(files, tmp_path, queries="new_g.npz", gallery="old_g.npz", same_items=True)
    assert found["pairs"] == again["pairs"]


def test_ids_and_cameras_are_used(tmp_path):
    order = np.random.default_rng(0).permutation(120)
    ids, cameras = np.array([f"item {row}" for row in range(120)]), np.arange(120) % 3
    embeddings, labels = ARRAYS["old_g"]
    np.savez(tmp_path / "q.npz", embeddings=embeddings, labels=labels, ids=ids, cameras=cameras)
    mixed = {"embeddings": embeddings[order], "labels": labels[order], "ids": ids[order], "cameras": cameras[order]}
    np.savez(tmp_path / "g.npz", **mixed)
    found = measured(tmp_path, tmp_path, queries="q.npz", gallery="g.npz")
    rows = unit(embeddings)
    expected = CrossModelAccuracyCalculator(include=METRICS).get_accuracy(
        rows, labels, rows, labels, query_ids=ids, reference_ids=ids, query_cameras=cameras, reference_cameras=cameras
    )
    assert {metric: found["pairs"]["new_to_old"][metric] for metric in METRICS} == pytest.approx(expected)
    assert (found["data"]["same_items"], found["data"]["cameras"]) == ("id", True)


def test_blocks_of_queries_do_not_show(files, tmp_path, metrics, monkeypatch):
    monkeypatch.setattr(sys.modules["pml_compat.upgrade.evaluate"], "_BLOCK", 7)
    found = measured(files, tmp_path, **EVERYTHING)
    assert accuracies(found, "new_to_new") == pytest.approx(accuracies(metrics, "new_to_new"))
    options = {"queries": "new_g.npz", "gallery": "old_g.npz", "same_items": True}
    blocks = measured(files, tmp_path, **options)
    monkeypatch.undo()
    whole = measured(files, tmp_path, **options)
    assert accuracies(blocks, "new_to_old") == pytest.approx(accuracies(whole, "new_to_old"))


def test_settings_reach_the_calculator(files, tmp_path):
    assert main([*command(files, tmp_path / "out", k=3), "--no-normalize"]) == 2
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["pairs"]["new_to_old"]
    (query, labels), (gallery, gallery_labels) = ARRAYS["new_q"], ARRAYS["old_g"]
    expected = CrossModelAccuracyCalculator(include=METRICS, k=3).get_accuracy(query, labels, gallery, gallery_labels)
    assert {metric: found[metric] for metric in METRICS} == pytest.approx(expected)


def test_lone_queries_and_widths_are_noted(files, tmp_path, capsys):
    embeddings, labels = ARRAYS["fit_q"]
    wide = np.concatenate([embeddings, np.zeros((90, 2), np.float32)], 1)
    np.savez(files / "wide.npz", embeddings=wide, labels=np.where(labels == 0, 77, labels))
    assert main(command(files, tmp_path / "out", queries="wide.npz")) == 3
    assert "queries must be as wide as gallery, got widths 7 and 5" in capsys.readouterr().err
    found = measured(files, tmp_path, queries="wide.npz", fit_width=True)
    assert "New queries are 7 wide and the stored gallery 5" in found["notes"][0]
    lone = int((labels == 0).sum())
    assert found["notes"][1] == f"{lone} queries have no item of their label in the gallery and do not count."
    assert found["data"]["scored_queries"] == 90 - lone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": "nothing.npz"}, "--queries: there is no "),
        ({"queries": "new_q.npy"}, "--queries must come with labels, "),
        ({"old_queries": "old_g.npz"}, "--old-queries must have the items of --queries: expected 90 rows, got 120"),
        ({"new_gallery": "narrow.npz"}, "--new-gallery must be as wide as --queries, .*: expected 5, got 4"),
        ({"old_queries": "narrow_q.npz"}, "--old-queries must be as wide as --gallery, .*: expected 5, got 4"),
        ({"same_items": True}, "--same-items must be left out where row i of --gallery is not the item"),
        ({"queries": "nan.npz"}, "embeddings of --queries must be finite, row 3 has a NaN"),
        ({"queries": "other.npz"}, "gallery must hold items with the labels of queries, it has none of them"),
        ({"transformation": "nothing"}, "--transformation: there is no "),
        (
            {"transformation": "narrow.safetensors"},
            "--transformation must map the gallery's width .*, 5 to 5, got 4 to 5",
        ),
        ({"transformation": "map5.safetensors", "side_info": "old_g.npy"}, "--side-info must be left out for this"),
        ({"side_info": "old_g.npy"}, "--side-info must be left out without --transformation"),
        ({"fars": 2.0}, "fars must "),
        ({"device": Path("abacus")}, "--device must be one that torch has here, got 'abacus'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(changes, message, files, tmp_path, capsys):
    (embeddings, labels), (new_g, gallery_labels) = ARRAYS["new_q"], ARRAYS["new_g"]
    np.savez(files / "narrow.npz", embeddings=new_g[:, :4], labels=gallery_labels)
    np.savez(files / "narrow_q.npz", embeddings=embeddings[:, :4], labels=labels)
    np.savez(files / "other.npz", embeddings=embeddings, labels=labels + 100)
    broken = embeddings.copy()
    broken[3, 1] = np.nan
    np.savez(files / "nan.npz", embeddings=broken, labels=labels)
    LinearTransformation(4, WIDTH).save(files / "narrow.safetensors")
    LinearTransformation(WIDTH, WIDTH).save(files / "map5.safetensors")
    assert main(command(files, tmp_path / "out", **changes)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"pml-compat: {message}", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["rich.console", "matplotlib.figure"])
def test_missing_extra_gives_the_pip_command_before_the_work(module, files, tmp_path, monkeypatch, capsys):
    package = module.partition(".")[0]

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(evaluate, "load", lambda *args: pytest.fail("read"))
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    for name in (package, module):
        monkeypatch.delitem(sys.modules, name)
    assert main(command(files, tmp_path / "out")) == 3
    expected = f'pml-compat: {package} is not installed; run: pip install "pml-compat[report]"\n'
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["paired", "page"])
def test_an_interrupted_run_leaves_what_was_there(where, files, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        assert any(name.name.startswith(".out-") for name in tmp_path.iterdir())
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("older")
    place = sys.modules["pml_compat.upgrade.evaluate"] if where == "paired" else evaluate
    monkeypatch.setattr(place, {"paired": "pair_criterion", "page": "html_page"}[where], interrupted)
    assert main(command(files, tmp_path / "out", **EVERYTHING)) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {"metrics.json": "older"}
    assert "interrupted, nothing was written" in capsys.readouterr().err


def test_a_plain_kill_leaves_nothing_behind(tmp_path):
    rng = np.random.default_rng(0)
    for name, rows in (("q", 4000), ("g", 20000)):
        np.savez(tmp_path / f"{name}.npz", embeddings=rng.normal(size=(rows, 64)), labels=rng.integers(0, 9, rows))
    out = tmp_path / "place"
    out.mkdir()
    arguments = command(tmp_path, out / "out", queries="q.npz", gallery="g.npz", new_gallery="g.npz")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "pml_compat", *arguments]
    with subprocess.Popen(run, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(out.glob(".out-*")):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline, "the evaluation did not begin"
                time.sleep(0.05)
            process.terminate()
            message = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode in (130, -signal.SIGINT)
    assert "pml-compat: interrupted, nothing was written" in message
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "extra", [["--k", "0"], ["--seed", "-1"], ["--transformation", "a", "--transformed-gallery", "b"]]
)
def test_unusable_arguments_are_a_usage_error(extra, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command(files, tmp_path / "out"), *extra])
    assert stop.value.code == 3
    assert extra[0].strip("-") in capsys.readouterr().err


def test_estimate_warns_where_memory_will_not_do(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "available_memory", lambda: 2**20)
    assert main(command(files, tmp_path / "out")) == 2
    assert "that is more than the 1 MiB of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "1 s"), (99, "99 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds, text):
    assert estimate.duration(seconds) == text


def test_json_on_standard_output(files, tmp_path, capsys):
    assert main([*command(files, tmp_path / "out", **EVERYTHING), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pairs"] == json.loads((tmp_path / "out" / "metrics.json").read_text())["pairs"]


def test_labels_that_are_given_count(files, tmp_path):
    np.savez(tmp_path / "other.npz", embeddings=ARRAYS["old_q"][0], labels=QUERY_LABELS + 50)
    with_labels = measured(files, tmp_path, query_labels="query_labels.npy", old_queries=str(tmp_path / "other.npz"))
    assert with_labels["pairs"] == measured(files, tmp_path, old_queries="old_q.npz")["pairs"]


@pytest.mark.parametrize(
    ("stop", "status"),
    [([], 0), (["swap_now"], 1), (["backfill_first", "not_enough_queries"], 0), (["warning"], 1)],
)
def test_fail_on_ends_with_1_at_the_verdicts_that_it_names(stop, status, files, tmp_path):
    spoiled, groups = ARRAYS["fit_q"][0].copy(), np.where(QUERY_LABELS % 2 == 0, "even", "odd")
    spoiled[:2] = -spoiled[:2]  # right first today: flips are a warning
    np.savez(tmp_path / "spoiled.npz", embeddings=spoiled, labels=QUERY_LABELS)
    np.save(tmp_path / "groups.npy", groups)
    arguments = command(files, tmp_path / "out", queries=str(tmp_path / "spoiled.npz"), old_queries="old_q.npz")
    arguments += ["--groups", str(tmp_path / "groups.npy"), *(["--fail-on", *stop] if stop else [])]
    assert main(arguments) == status
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored["verdict"]["outcome"] == "swap_now" and set(stored["groups"]) == {"even", "odd"}
    assert stored["verdict"]["warnings"]


def test_the_index_that_is_served(files, tmp_path, capsys):
    pytest.importorskip("faiss")
    arguments = command(files, tmp_path / "out", queries="fit_q.npz", old_queries="old_q.npz")
    assert main([*arguments, "--index", "IVF4,Flat", "--nprobe", "4"]) == 0
    assert main([*arguments, "--nprobe", "4"]) == 3
    assert "--nprobe must be left out without --index" in capsys.readouterr().err
