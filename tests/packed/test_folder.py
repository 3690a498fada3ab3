"""Packed folders hold every bit of the dense ones, in as few bytes as they say, and appear whole or not at all."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maskopt.errors import MaskoptError
from maskopt.packed import encoding
from maskopt.packed.folder import is_packed, pack, unpack
from maskopt.packed.packed_tensors import DTYPES, Packed, PackedError, as_bytes

STORED = "packed-00001-of-00001.safetensors"


def dense_folder(path: Path, *shards: dict[str, torch.Tensor], **config: object) -> Path:
    """A folder of a model of tensors, in one file or in several."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}, indent=2) + "\n")
    (path / "tokenizer.json").write_text("{}")
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return path
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 7}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path


def sparse(*shape: int, dtype: torch.dtype = torch.float32, sparsity: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) >= sparsity
    return torch.randn(shape, generator=generator).mul(kept).add(0.0).to(dtype)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and bool((as_bytes(one) == as_bytes(two)).all())


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits of any type and shape, many of them zero, of either sign."""
    name = draw(st.sampled_from(sorted(DTYPES)))
    dtype = DTYPES[name]
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    count = int(np.prod(shape))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype is torch.bool:
        return torch.from_numpy(generator.integers(0, 2, count).astype(bool)).reshape(shape)
    words = generator.integers(0, 256, (count, dtype.itemsize), dtype=np.uint8)
    words[generator.random(count) < draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))] = 0
    if dtype.is_floating_point:
        words[generator.random(count) < draw(st.sampled_from([0.0, 0.0, 0.3])), :-1] = 0  # negative zeros among them
        words[words[:, :-1].sum(1) == 0, -1] &= 0x80
    return torch.from_numpy(words.reshape(-1)).view(dtype).reshape(shape)


@given(st.dictionaries(st.sampled_from("abcdef"), tensors(), min_size=1), st.booleans())
def test_every_bit_of_any_tensor_survives(tmp_path_factory, found, compress):
    compress = compress and encoding.zstandard() is not None
    path = tmp_path_factory.mktemp("packed")
    pack(dense_folder(path / "dense", found), path / "packed", compress=compress)
    packed = Packed(path / "packed")
    assert all(same_bits(packed.read(name), tensor) for name, tensor in found.items())
    unpack(path / "packed", path / "again")
    again = load_file(path / "again" / "model.safetensors")
    assert again.keys() == found.keys()
    assert all(same_bits(again[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_a_zero_takes_one_bit(tmp_path, dtype, sparsity):
    weight = sparse(64, 128, dtype=dtype, sparsity=sparsity)
    report = pack(dense_folder(tmp_path / "dense", {"weight": weight}), tmp_path / "packed")
    kept = int(torch.count_nonzero(weight))
    assert report.dense == weight.nbytes
    assert report.packed == 64 * 128 // 8 + kept * dtype.itemsize + -(kept * dtype.itemsize) % 8
    with safe_open(tmp_path / "packed" / STORED, "np") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == report.packed  # noqa: SIM118
    assert report.to_json()["ratio"] == report.packed / report.dense
    assert report.kinds["mask and values"].tensors == 1


def test_negative_zeros_take_a_bit_for_each_zero_and_only_where_there_are_some(tmp_path):
    weight = sparse(64, 128)
    zeros = int((weight == 0).sum())
    folders = {"positive": weight, "negative": weight * torch.where(sparse(64, 128, seed=1) > 0, 1.0, -1.0)}
    sizes = {}
    for name, tensor in folders.items():
        sizes[name] = pack(dense_folder(tmp_path / name, {"weight": tensor}), tmp_path / f"{name}-packed").packed
        assert same_bits(Packed(tmp_path / f"{name}-packed").read("weight"), tensor)
    assert torch.signbit(folders["negative"])[weight == 0].any()
    assert not torch.signbit(folders["positive"])[weight == 0].any()
    assert zeros / 8 <= sizes["negative"] - sizes["positive"] < zeros / 8 + 9


def test_what_packing_would_not_make_smaller_stays_as_it_is(tmp_path):
    found = {
        "dense.weight": sparse(16, 16, sparsity=0.0),
        "few.weight": sparse(16, 16, sparsity=0.02),
        "half.weight": sparse(16, 16, sparsity=0.5),
        "odd.bias": torch.ones(3, dtype=torch.float16),
        "byte": torch.ones(5, dtype=torch.uint8),
        "step": torch.tensor(7),
    }
    report = pack(dense_folder(tmp_path / "dense", found), tmp_path / "packed")
    with safe_open(tmp_path / "packed" / STORED, "pt") as file:
        names = set(file.keys())
        assert names == {*found, "half.weight:mask", "half.weight:values"} - {"half.weight"}
        assert torch.equal(file.get_tensor("few.weight"), found["few.weight"])
    assert {name: kind.tensors for name, kind in report.kinds.items()} == {"mask and values": 1, "as they are": 5}


@pytest.mark.parametrize("compress", [False, True])
def test_unpacking_gives_the_dense_folder_back(tmp_path, compress):
    if compress:
        pytest.importorskip("zstandard")
    shards = {"a.weight": sparse(8, 24), "b": torch.ones(3)}, {"c.weight": sparse(8, 8), "d": torch.tensor(2.0)}
    source = dense_folder(tmp_path / "dense", *shards, architectures=["X"], text="ä")
    (source / "more").mkdir()
    (source / "more" / "notes.txt").write_text("notes")
    (source / "pytorch_model.bin").write_text("the same weights once more")
    packing = pack(source, tmp_path / "packed", compress=compress)
    assert is_packed(tmp_path / "packed")
    assert not is_packed(source)
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert not [name for name in names if name.startswith(("model", "pytorch_model"))]
    report = unpack(tmp_path / "packed", tmp_path / "again")
    assert (report.dense, report.packed, report.kinds) == (packing.dense, packing.packed, packing.kinds)
    assert report.other_files == packing.other_files == len("{}notes")
    again = tmp_path / "again"
    assert {path.name for path in again.iterdir()} == {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
    assert (again / "more" / "notes.txt").read_text() == "notes"
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((again / name).read_text()) == json.loads((source / name).read_text())
    for number, tensors in enumerate(shards, 1):
        file = again / f"model-0000{number}-of-00002.safetensors"
        with safe_open(file, "pt") as content:
            assert content.metadata() == {"format": "pt"}
        found = load_file(file)
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_compression_makes_values_smaller(tmp_path):
    pytest.importorskip("zstandard")
    weight = sparse(256, 512, dtype=torch.bfloat16)
    source = dense_folder(tmp_path / "dense", {"weight": weight, "norm": torch.ones(512, dtype=torch.bfloat16)})
    plain, small = pack(source, tmp_path / "plain"), pack(source, tmp_path / "small", compress=True)
    assert plain.ratio == pytest.approx(0.56, abs=0.01)
    assert small.ratio < 0.45
    assert {name: kind.tensors for name, kind in small.kinds.items()} == {"mask and values": 1, "compressed": 1}


def test_without_zstandard_compressing_and_reading_are_refused(tmp_path, monkeypatch):
    source = dense_folder(tmp_path / "dense", {"weight": torch.ones(64, 64)})
    compressed = encoding.zstandard() is not None
    if compressed:
        pack(source, tmp_path / "compressed", compress=True)
    monkeypatch.setattr("maskopt.packed.packed_tensors.importlib.import_module", _refuse)
    with pytest.raises(MaskoptError, match=r'^--compress needs Zstandard, .*pip install "maskopt\[zstd\]"\.$'):
        pack(source, tmp_path / "packed", compress=True)
    pack(source, tmp_path / "packed")
    if compressed:
        with pytest.raises(MaskoptError, match=r"is compressed, and no Zstandard is installed to read it: pip install"):
            unpack(tmp_path / "compressed", tmp_path / "again")


def _refuse(name: str) -> None:
    raise ImportError(name)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    many = {f"layer.{index}.weight": sparse(256, 256, seed=index) for index in range(24)}
    source = dense_folder(tmp_path / "dense", many)
    for step in (lambda: pack(source, tmp_path / "packed"), lambda: unpack(tmp_path / "packed", tmp_path / "again")):
        tracemalloc.start()
        step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * 256 * 256 * 4 + 10**5  # far from the 24 of them


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["pack", "unpack"])
def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path, error, step):
    source = dense_folder(tmp_path / "dense", {"a.weight": sparse(16, 16), "b.weight": sparse(16, 16)})
    pack(source, tmp_path / "packed")

    def fail(name: str, fraction: float) -> None:
        assert 0.0 <= fraction < 1.0
        if name == "b.weight":
            raise error

    call = {"pack": lambda: pack(source, tmp_path / "out", progress=fail)}
    call["unpack"] = lambda: unpack(tmp_path / "packed", tmp_path / "out", progress=fail)
    with pytest.raises(MaskoptError if isinstance(error, OSError) else KeyboardInterrupt):
        call[step]()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_what_exists_is_never_touched(tmp_path):
    source = dense_folder(tmp_path / "dense", {"a.weight": sparse(16, 16)})
    pack(source, tmp_path / "packed")
    (tmp_path / "there").write_text("mine")
    for call in (lambda: pack(source, tmp_path / "there"), lambda: unpack(tmp_path / "packed", tmp_path / "there")):
        with pytest.raises(MaskoptError, match="there exists already"):
            call()
    assert (tmp_path / "there").read_text() == "mine"


REFUSED = {
    "no folder": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "does not say which kind of model"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is damaged: it is no JSON"),
    "quantised": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2", "quantization_config": {}}'),
        "are quantised",
    ),
    "own code": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "x.X"}}'),
        "comes with code of its own",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "weights of torch": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only safetensors files can be packed",
    ),
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "not a readable safetens"),
    "a name of ours": (lambda folder: (folder / "packed.json").write_text("{}"), "has the name of a file of packed"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_folders_that_cannot_be_packed_are_refused_in_a_sentence(tmp_path, change, words):
    source = dense_folder(tmp_path / "dense", {"a.weight": sparse(16, 16)})
    change(source)
    with pytest.raises(MaskoptError, match=r"^The [^\n]*\.$") as caught:
        pack(source, tmp_path / "packed")
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_packing_twice_or_unpacking_a_dense_folder_is_refused(tmp_path):
    source = dense_folder(tmp_path / "dense", {"a.weight": sparse(16, 16)})
    pack(source, tmp_path / "packed")
    with pytest.raises(MaskoptError, match="packed is packed already"):
        pack(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(MaskoptError, match="dense is not packed"):
        unpack(source, tmp_path / "again")


def manifest(change):
    def apply(folder: Path) -> None:
        content = json.loads((folder / "packed.json").read_text())
        change(content)
        (folder / "packed.json").write_text(json.dumps(content))

    return apply


def entry(**changes):
    return manifest(lambda content: content["tensors"]["a.weight"].update(changes))


def flip(folder: Path) -> None:
    data = bytearray((folder / STORED).read_bytes())
    data[-40] ^= 1
    (folder / STORED).write_bytes(data)


DAMAGED = {
    "no dense configuration": lambda folder: (folder / "config.json").write_text('{"model_type": "maskopt-packed"}'),
    "a flipped bit": flip,
    "a lost file": lambda folder: (folder / STORED).unlink(),
    "a cut file": lambda folder: (folder / STORED).write_bytes((folder / STORED).read_bytes()[:-64]),
    "no manifest": lambda folder: (folder / "packed.json").unlink(),
    "no JSON": lambda folder: (folder / "packed.json").write_text("{"),
    "a list": lambda folder: (folder / "packed.json").write_text("[1]"),
    "a later format": manifest(lambda content: content.update(format=2)),
    "no tensors": manifest(lambda content: content.pop("tensors")),
    "no weights": manifest(lambda content: content.pop("weights")),
    "a file elsewhere": entry(file="../x.safetensors"),
    "a source elsewhere": manifest(lambda content: content["weights"].update({"../x.safetensors": {}})),
    "a source without metadata": manifest(lambda content: content.update(weights={"model.safetensors": 3})),
    "an unknown source": entry(source="x.safetensors"),
    "another type": entry(dtype="F64"),
    "an unknown type": entry(dtype="F7"),
    "another shape": entry(shape=[16, 17]),
    "a negative shape": entry(shape=[-16, -16]),
    "a shape of words": entry(shape=["16", 16]),
    "another count": entry(kept=3),
    "another checksum": entry(crc32=3),
    "no parts": entry(parts={}),
    "other parts": entry(parts={"values": {"zstd": False, "bytes": 8}}),
    "parts without form": entry(parts={"values": {}, "mask": {}}),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_damaged_folders_are_refused_in_a_sentence(tmp_path, change):
    source = dense_folder(tmp_path / "dense", {"a.weight": sparse(16, 16)})
    pack(source, tmp_path / "packed")
    change(tmp_path / "packed")
    with pytest.raises(MaskoptError, match=r"^The [^\n]*packed[^\n]* (is damaged|has format 2)[^\n]*\.$"):
        unpack(tmp_path / "packed", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]
    if change is not DAMAGED["no dense configuration"]:
        with pytest.raises(PackedError):
            Packed(tmp_path / "packed").read("a.weight")
