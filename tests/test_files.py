import os
import signal
import stat

import pytest

from pml_compat._files import whole_file, whole_folder

ERRORS = [RuntimeError, KeyboardInterrupt]


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o077], ids=["umask_022", "umask_077"])
def umask(request):
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "data.npy"
    with whole_file(str(path)) as temporary:
        temporary.write_text("all of it")
        assert temporary.suffix == ".npy"  # np.save would append one
        assert not path.exists()
    assert files_in(tmp_path) == {"new/data.npy": "all of it"}


def test_file_takes_the_place_of_an_older_one(tmp_path):
    (tmp_path / "data.txt").write_text("old")
    with whole_file(tmp_path / "data.txt") as temporary:
        temporary.write_text("new")
    assert files_in(tmp_path) == {"data.txt": "new"}


@pytest.mark.parametrize("error", ERRORS)
def test_interrupted_file_leaves_the_older_one(error, tmp_path):
    (tmp_path / "data.txt").write_text("old")
    with pytest.raises(error), whole_file(tmp_path / "data.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert files_in(tmp_path) == {"data.txt": "old"}


def test_file_that_cannot_be_placed_leaves_no_temporary_one(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"), whole_file(tmp_path / "taken") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_permissions_are_those_of_any_new_file_or_folder(umask, tmp_path):
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    with whole_folder(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "out"
    with whole_folder(str(path)) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("1")
        (temporary / "b").write_text("2")
        assert not path.exists()
    assert files_in(tmp_path) == {"new/out/deep/a": "1", "new/out/b": "2"}
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["out"]


def test_older_folder_keeps_its_other_files(tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a").write_text("old")
    (tmp_path / "out" / "deep" / "kept").write_text("kept")
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("new")
        (temporary / "deeper" / "still").mkdir(parents=True)
        (temporary / "deeper" / "still" / "b").write_text("new")
        assert files_in(tmp_path / "out") == {"deep/a": "old", "deep/kept": "kept"}
    assert files_in(tmp_path) == {"out/deep/a": "new", "out/deep/kept": "kept", "out/deeper/still/b": "new"}
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_interrupted_folder_leaves_what_was_there(error, older, tmp_path):
    if older:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half")
        raise error
    assert files_in(tmp_path) == ({"out/a": "old"} if older else {})
    assert [found.name for found in tmp_path.iterdir()] == (["out"] if older else [])


def test_folder_refuses_the_place_of_a_file_before_the_work(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"path must be a folder or free, '.*file' is a file"), whole_folder(path):
        pytest.fail("the block was entered")
    assert files_in(tmp_path) == {"file": "old"}


def test_folder_under_a_file_fails_before_the_work(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="file"), whole_folder(tmp_path / "file" / "out"):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("taken", ["b", "b/c/d"])
def test_folder_that_cannot_be_placed_leaves_the_older_one(taken, tmp_path):
    (tmp_path / "out" / taken).parent.mkdir(parents=True)
    (tmp_path / "out" / "a").write_text("old")
    (tmp_path / "out" / taken).write_text("in the way of a new folder, or in a folder in the way of a new file")
    before = files_in(tmp_path)
    with pytest.raises(OSError, match="in the way"), whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("new")
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_text("new")
    assert files_in(tmp_path) == before
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, kind):
    block = {"file": whole_file, "folder": whole_folder}[kind]
    target = tmp_path / "rows.bin"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # dies inside the block
        with block(target):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with block(target) as mine:
        (mine / "a" if kind == "folder" else mine).write_text("mine")
        assert len(list(tmp_path.iterdir())) == 2  # the living one's stays
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    if kind == "folder":
        with block(target) as mine:
            (mine / "a").write_text("next")
    else:
        with block(target) as mine:
            mine.write_text("next")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.bin"]
