"""Outputs are whole or absent, and nothing that exists is touched."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, require_absent


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
def test_success(tmp_path: Path, write: Callable[[Path], None], as_text: bool) -> None:
    target = tmp_path / "out"
    with atomic_path(str(target) if as_text else target) as aside:
        assert aside.name == "out"
        assert not target.exists()
        write(aside)
        assert not target.exists()
    assert content(target) == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("write", KINDS)
def test_relative_paths(tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_block_that_writes_nothing(tmp_path: Path) -> None:
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


def test_no_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "no" / "out", tmp_path / "file" / "out"):
        with pytest.raises(MaskoptError, match=r"the folder .* does not exist"), atomic_path(target):
            raise AssertionError("the block must not run")


def test_require_absent(tmp_path: Path) -> None:
    assert require_absent(str(tmp_path / "out")) == tmp_path / "out"
    for path in ("", ".", "..", "/", tmp_path):
        with pytest.raises(MaskoptError):
            require_absent(path)


def test_names_up_to_what_the_file_system_allows(tmp_path: Path) -> None:
    for length in (100, 230):
        with atomic_path(tmp_path / ("n" * length)) as aside:
            write_file(aside)
    with pytest.raises(MaskoptError), atomic_path(tmp_path / ("n" * 300)) as aside:
        write_file(aside)


def test_the_longest_legal_name(tmp_path: Path) -> None:
    with atomic_path(tmp_path / ("n" * 255)) as aside:
        write_file(aside)


def test_many_writers_one_winner(tmp_path: Path) -> None:
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
