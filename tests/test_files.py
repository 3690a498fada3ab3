"""Outputs are complete or absent, and existing files are not changed."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maskopt.errors import MaskoptError
from maskopt.files import (
    atomic_path,
    discard_unfinished,
    open_tensors,
    remove_stale,
    renamed,
    require_absent,
    written_since,
)


def write_file(path: Path) -> None:
    path.write_text("new")


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("new")


def content(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


KINDS = [write_file, write_folder]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_output_appears_when_its_block_ends(tmp_path: Path, write: Callable[[Path], None], as_text: bool) -> None:
    target = tmp_path / "out"
    with atomic_path(str(target) if as_text else target) as aside:
        assert aside.name == "out"
        assert not target.exists()
        write(aside)
        assert not target.exists()
    assert content(target) == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("write", KINDS)
def test_relative_paths_are_written(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_path("out") as aside:
        write(aside)
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MaskoptError, GeneratorExit])
def test_an_exception_leaves_nothing(tmp_path: Path, write: Callable[[Path], None], error: type) -> None:
    with pytest.raises(error), atomic_path(tmp_path / "out") as aside:
        write(aside)
        raise error("now")
    assert os.listdir(tmp_path) == []


def test_an_os_error_is_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(MaskoptError, match=r"The output .*out could not be written: No space left on device\."),
        atomic_path(tmp_path / "out") as aside,
    ):
        write_file(aside)
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskoptError, match="could not be written"), atomic_path(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [*KINDS, lambda path: path.symlink_to("nowhere"), lambda path: path.mkdir()])
def test_an_existing_output_stays(tmp_path: Path, existing: Callable[[Path], None]) -> None:
    target = tmp_path / "out"
    existing(target)
    before = os.lstat(target)
    with pytest.raises(MaskoptError, match="exists already"), atomic_path(target):
        raise AssertionError("the block must not run")
    assert os.lstat(target) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("rival", [*KINDS, lambda path: path.mkdir()])
def test_an_output_that_appears_meanwhile_stays(
    tmp_path: Path, write: Callable[[Path], None], rival: Callable[[Path], None]
) -> None:
    target = tmp_path / "out"
    with pytest.raises(MaskoptError, match="exists already"), atomic_path(target) as aside:
        write(aside)
        rival(target)
        before = os.lstat(target)
    assert os.lstat(target) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_missing_parent_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "no" / "out", tmp_path / "file" / "out"):
        with pytest.raises(MaskoptError, match=r"the folder .* does not exist"), atomic_path(target):
            raise AssertionError("the block must not run")


def test_require_absent_refuses_existing_paths(tmp_path: Path) -> None:
    assert require_absent(str(tmp_path / "out")) == tmp_path / "out"
    for path in ("", ".", "..", "/", tmp_path):
        with pytest.raises(MaskoptError):
            require_absent(path)


def test_long_names_are_written_up_to_the_limit_of_the_file_system(tmp_path: Path) -> None:
    for length in (100, 230):
        with atomic_path(tmp_path / ("n" * length)) as aside:
            write_file(aside)
    with pytest.raises(MaskoptError), atomic_path(tmp_path / ("n" * 300)) as aside:
        write_file(aside)


def test_the_longest_legal_name(tmp_path: Path) -> None:
    with atomic_path(tmp_path / ("n" * 255)) as aside:
        write_file(aside)


def test_only_one_of_many_writers_succeeds(tmp_path: Path) -> None:
    target, ready, won, refused = tmp_path / "out", threading.Barrier(8), [], []

    def work(number: int) -> None:
        try:
            with atomic_path(target) as aside:
                aside.mkdir()
                (aside / "who").write_text(str(number))
                ready.wait(timeout=30)
            won.append(number)
        except MaskoptError:
            refused.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 7
    assert (target / "who").read_text() == str(won[0])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("write", KINDS)
def test_permissions_are_the_ordinary_ones(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with atomic_path(tmp_path / "out") as aside:
        write(aside)
    write(tmp_path / "plain")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n" * 256, "File name too long"),
        ("n" * 5000, "File name too long"),
        ("", "needs a name"),
        ("a\0b", "null byte"),
        ("loop/out", "Too many levels"),
        ("dangling/out", "does not exist"),
    ],
)
def test_names_that_cannot_be_made_are_found_before_the_work(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(MaskoptError, match=words):
        require_absent(os.path.join(tmp_path, name) if name else name)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("folder", ["/proc", "/proc/self", "/dev/full"])
def test_folders_that_take_no_files_are_found_before_the_work(folder: str) -> None:
    with pytest.raises(MaskoptError, match="cannot be written"):
        require_absent(f"{folder}/out")


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from maskopt.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as aside:\n"
        "    aside.mkdir(); (aside / 'half').write_text('half'); print('now', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    (hidden,) = tmp_path.iterdir()
    require_absent(target)
    remove_stale(tmp_path)
    assert (hidden / "new" / "out" / "half").read_text() == "half"  # its process is alive: it is not removed
    process.kill()
    process.wait()
    process.stdout.close()
    assert hidden.is_dir()
    require_absent(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_only_folders_of_this_kind_are_removed(tmp_path: Path) -> None:
    mark = "0123456789abcdef"
    for name in ("plain", f".out.{mark[:-1]}.tmp", f"out.{mark}.tmp", f".other.{mark}.tmp", f".full.{mark}.tmp"):
        (tmp_path / name).mkdir()
        if "other" not in name:
            (tmp_path / name / "inside").write_text("precious")
    (tmp_path / f".file.{mark}.tmp").write_text("precious")
    (tmp_path / f".link.{mark}.tmp").symlink_to("plain")
    before = sorted(os.listdir(tmp_path))
    remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before  # the empty one may be about to take its lock
    old = time.time() - 3600
    for name in before:
        os.utime(tmp_path / name, (old, old), follow_symlinks=False)
    remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(set(before) - {f".other.{mark}.tmp"})


def test_what_was_written_is_known(tmp_path: Path) -> None:
    start = renamed()
    with atomic_path(tmp_path / "one") as aside:
        write_file(aside)
        assert written_since(start) == []
    with atomic_path(tmp_path / "two") as aside:
        write_folder(aside)
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "three") as aside:
        write_file(aside)
        raise RuntimeError
    assert written_since(start) == [tmp_path / "one", tmp_path / "two"]
    assert written_since(start + 1) == [tmp_path / "two"]
    (tmp_path / "one").unlink()
    (tmp_path / "one").write_text("another file")
    assert written_since(start) == [tmp_path / "two"]


def test_unfinished_outputs_can_be_discarded_at_once(tmp_path: Path) -> None:
    with pytest.raises(MaskoptError, match="could not be written"), atomic_path(tmp_path / "out") as aside:
        write_file(aside)
        discard_unfinished()
        assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 100, b"\x02" + 7 * b"\0" + b"{}", b"\0" * 8, b"[" * 100_000]
)
def test_files_that_are_no_tensors_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    words = r"^The thing .*x is not a readable safetensors file: [^\n]*\.$"
    with pytest.raises(MaskoptError, match=words), open_tensors("thing", tmp_path / "x") as file:
        file.get_tensor("weight")


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "no", tmp_path / "loop", "/dev/null", "n" * 5000, ""):
        with pytest.raises(MaskoptError, match="does not exist or is not a file"), open_tensors("thing", path):
            raise AssertionError("the block must not run")
