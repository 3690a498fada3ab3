"""Instance files: round trips, bad files, and outputs that are never half-written."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from maskopt.errors import MaskoptError
from maskopt.problems import Instance, load_instance, save_instance, synthetic
from tests.helpers import examples


def small(**metadata: str) -> Instance:
    return Instance(torch.arange(6.0).view(2, 3), torch.eye(3) * 2, metadata)


@pytest.mark.parametrize("weight", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gram", [torch.float32, torch.float64], ids=str)
def test_saved_instances_load_unchanged(tmp_path: Path, weight: torch.dtype, gram: torch.dtype) -> None:
    instance = synthetic(rows=3, d=5)
    instance = Instance(instance.weight.to(weight), instance.gram.to(gram), {"tokens": "40", "origin": "höhe \u2603"})
    save_instance(tmp_path / "layer.safetensors", instance)
    loaded = load_instance(str(tmp_path / "layer.safetensors"))
    assert torch.equal(loaded.weight, instance.weight)
    assert torch.equal(loaded.gram, instance.gram)
    assert (loaded.weight.dtype, loaded.gram.dtype) == (weight, gram)
    assert loaded.metadata == instance.metadata
    assert loaded.tokens == 40
    assert os.listdir(tmp_path) == ["layer.safetensors"]


def test_strided_and_tracked_tensors_load_unchanged(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2)).T
    save_instance(tmp_path / "a", Instance(weight, torch.eye(6)[::2, ::2]))
    loaded = load_instance(tmp_path / "a")
    assert torch.equal(loaded.weight, weight)
    assert torch.equal(loaded.gram, torch.eye(3))
    assert loaded.metadata == {}
    assert loaded.tokens is None


@given(st.dictionaries(st.text(), st.text(), max_size=3))
@examples(40)
def test_any_text_is_metadata(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    save_instance(path, small(**{"origin": "x"} | metadata))
    assert load_instance(path).metadata == {"origin": "x"} | metadata


@pytest.mark.parametrize(
    ("text", "tokens"), [("17", 17), ("", None), ("many", None), ("-3", None), ("1.5", None), (" 7", None)]
)
def test_tokens_are_read_from_the_metadata(text: str, tokens: int | None) -> None:
    assert small(tokens=text).tokens == tokens
    assert small().tokens is None
    assert small(tokens="9").problem().tokens == 9


def test_malformed_tokens_are_none() -> None:
    assert small(tokens="²").tokens is None


def test_the_problem_is_checked() -> None:
    with pytest.raises(MaskoptError, match="positive semidefinite"):
        Instance(torch.ones(1, 2), -torch.eye(2)).problem()
    with pytest.raises(MaskoptError, match="got shapes"):
        Instance(torch.ones(2), torch.eye(2)).problem()


# Bad files


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(MaskoptError, match="does not exist or is not a file"):
            load_instance(path)


@pytest.mark.parametrize("content", [b"", b"{", b"hello" * 20, b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "], ids=repr)
def test_files_of_other_formats_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(MaskoptError, match=r"The instance .*a (is not a readable safetensors file|has no tensor)"):
        load_instance(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    save_instance(tmp_path / "whole", small(tokens="3"))
    content = (tmp_path / "whole").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(MaskoptError, match="is not a readable safetensors file"):
            load_instance(tmp_path / "cut")


@pytest.mark.parametrize(
    ("names", "missing"),
    [(["weight"], "no tensor named gram;"), (["gram"], "named weight;"), (["other"], "named gram nor weight;")],
)
def test_missing_tensors_are_named(tmp_path: Path, names: list[str], missing: str) -> None:
    save_file({name: torch.eye(2) for name in names}, tmp_path / "a")
    with pytest.raises(MaskoptError, match=missing):
        load_instance(tmp_path / "a")


def test_other_tensors_do_not_matter(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1, 2), "gram": torch.eye(2), "bias": torch.ones(1)}, tmp_path / "a")
    assert load_instance(tmp_path / "a").weight.shape == (1, 2)


# Saving


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("precious")
    with pytest.raises(MaskoptError, match="exists already"):
        save_instance(path, small())
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a"]


def test_saving_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskoptError, match=r"the folder .* does not exist"):
        save_instance(tmp_path / "nowhere" / "a", small())


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit files to `size` bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with disk_of(1000), pytest.raises(MaskoptError, match="could not be written"):
        save_instance(tmp_path / "a", synthetic(rows=64, d=64))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with disk_of(1000), pytest.raises(Exception, match=r"(?i)large|space|written|i/o"):
        save_instance(tmp_path / "a", synthetic(rows=64, d=64))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("maskopt.problems.instance.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_instance(tmp_path / "a", small())
    assert os.listdir(tmp_path) == []


def test_tensors_in_the_same_memory_are_saved(tmp_path: Path) -> None:
    both = torch.eye(4)
    save_instance(tmp_path / "a", Instance(both, both))
    assert torch.equal(load_instance(tmp_path / "a").gram, torch.eye(4))


def test_metadata_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskoptError):
        save_instance(tmp_path / "a", Instance(torch.ones(1, 2), torch.eye(2), {"tokens": 3}))
