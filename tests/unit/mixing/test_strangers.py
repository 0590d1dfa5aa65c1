"""Checkpoints from strangers: nothing of theirs runs, and damaged bytes end in one line or change nothing."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.mixing.cli import main
from tests.support.mixing import mix
from tests.unit.checkpoint.test_safe_pickle import little_memory
from tests.unit.mixing.checkpoints import expert_words, refused
from tests.unit.mixing.folders import llama_folder

KEY = "decoder.final_layernorm.weight"
NUMBERS = torch.arange(32, dtype=torch.float32)


class Runs:
    """A pickle that makes a folder when it is loaded by the plain unpickler."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


# --- the record of a tensor -----------------------------------------------------------------------------------


class _Storage:
    def __init__(self, key: object, count: object) -> None:
        self.key, self.count = key, count


class _Tensor:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        return ("storage", torch.FloatStorage, value.key, "cpu", value.count) if isinstance(value, _Storage) else None


def described(
    offset: object = 0, size: object = (32,), stride: object = (1,), count: object = 32, hooks: object = None, key="0"
) -> bytes:
    """The description of a tensor, as torch.save writes it."""
    out = io.BytesIO()
    hooks = collections.OrderedDict() if hooks is None else hooks
    _Pickler(out, 2).dump(_Tensor(_Storage(key, count), offset, size, stride, False, hooks))
    return out.getvalue()


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return out.getvalue()


DATA = ("archive/data/0", NUMBERS.numpy().tobytes())


def record(description: bytes, *more: tuple[str, bytes]) -> bytes:
    """A record with a description of one's own."""
    return archive(("archive/data.pkl", description), DATA, ("archive/version", b"3\n"), *more)


def _huge_sizes() -> bytes:
    """Both headers of the data claim almost 4 GiB."""
    honest, size = record(described(count=2**30 - 1)), len(DATA[1]).to_bytes(4, "little")
    assert honest.count(size * 2) >= 2
    return honest.replace(size * 2, (2**32 - 4).to_bytes(4, "little") * 2)


def _directory_beyond() -> bytes:
    content = bytearray(record(described()))
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 20] = b"\xff\xff\xff\x7f" * 2
    return bytes(content)


def _many_entries() -> bytes:
    content = bytearray(record(described()))
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 12] = b"\xff\xff\xff\xff"
    content[end + 12 : end + 16] = (0).to_bytes(4, "little")
    return bytes(content)


def _moved_start() -> bytes:
    """The header of the data says that they begin four bytes later than they do."""
    content = bytearray(record(described()))
    at = content.index(b"archive/data/0")
    content[at - 2 : at] = (4).to_bytes(2, "little")
    return bytes(content)


def _twice(name: str, first: bytes) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return archive((name, first), ("archive/data.pkl", described()), DATA, (name, first))


def _noncontiguous() -> bytes:
    return record(described(size=(16,), stride=(2,)))


RECORDS: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "empty": (lambda: b"", ["not a tensor's record"]),
    "no archive": (lambda: b"\x00" * 500, ["not a tensor's record"]),
    "an archive of nothing": (lambda: archive(), ["data.pkl"]),
    "no description": (lambda: archive(DATA), ["data.pkl"]),
    "no numbers": (lambda: archive(("archive/data.pkl", described())), ["data/0"]),
    "numbers of another name": (lambda: record(described(key="7")), ["data/7"]),
    "numbers outside": (lambda: record(described(key="../../../etc/passwd")), ["etc/passwd"]),
    "a path that leads out": (
        lambda: archive(("archive/../data.pkl", described()), DATA),
        ["not a tensor's record"],
    ),
    "a description that is packed": (
        lambda: archive(("archive/data.pkl", described()), DATA, compression=zipfile.ZIP_DEFLATED),
        ["archive/data.pkl is compressed"],
    ),
    "a description that grows without end": (
        lambda: archive(("archive/data.pkl", bytes(300 << 20)), DATA, compression=zipfile.ZIP_DEFLATED),
        ["archive/data.pkl is compressed"],
    ),
    "numbers packed": (
        lambda: _mixed_compression(),
        ["not a tensor's record"],
    ),
    "two descriptions": (lambda: _twice("archive/data.pkl", described()), ["two members have one name"]),
    "two numbers": (lambda: _twice("archive/data/0", DATA[1]), ["two members have one name"]),
    "sizes that are huge": (_huge_sizes, ["not a tensor's record"]),
    "a directory beyond the file": (_directory_beyond, ["not a tensor's record"]),
    "entries without end": (_many_entries, ["not a tensor's record"]),
    "numbers that begin elsewhere": (_moved_start, ["the header of archive/data/0"]),
    "more numbers than there are": (lambda: record(described(count=33)), ["128 bytes for 33 numbers"]),
    "a tensor larger than its storage": (lambda: record(described(count=8)), ["128 bytes for 8 numbers"]),
    "an offset past the end": (lambda: record(described(offset=1)), ["do not lie inside"]),
    "a negative offset": (lambda: record(described(offset=-8)), ["offset -8"]),
    "an offset of words": (lambda: record(described(offset="0")), ["storage_offset"]),
    "a negative size": (lambda: record(described(size=(-32,))), ["cannot be read"]),
    "a size of fractions": (lambda: record(described(size=(32.0,))), ["tuple of ints"]),
    "a size of words": (lambda: record(described(size=("32",))), ["tuple of ints"]),
    "a size that overflows": (lambda: record(described(size=(2**62, 2**62), stride=(2**62, 1))), ["cannot be read"]),
    "strides that skip": (_noncontiguous, ["contiguous numbers"]),
    "strides of nothing": (lambda: record(described(stride=(0,))), ["contiguous numbers"]),
    "fewer strides than axes": (lambda: record(described(stride=())), ["strides"]),
    "a count of words": (lambda: record(described(count="32")), ["for 32 numbers"]),
    "of another shape": (lambda: record(described(size=(4, 8), stride=(8, 1))), ["(4, 8)", "(32,)"]),
    "no tensor at all": (
        lambda: archive(("archive/data.pkl", pickle.dumps([1, 2, 3, 4, 5])), DATA),
        ["tensor's record"],
    ),
    "a number": (lambda: archive(("archive/data.pkl", pickle.dumps(5)), DATA), ["tensor's record"]),
    "a description that is cut": (lambda: record(described()[:-20]), ["cannot be read"]),
}


def _mixed_compression() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", described())
        file.writestr(*DATA, compress_type=zipfile.ZIP_DEFLATED)
    return out.getvalue()


def with_record(dense: Path, folder: Path, content: bytes) -> Path:
    """A copy of a checkpoint in which one tensor has another record."""
    target = shutil.copytree(dense / "iter_0000010", folder / "odd")
    (target / "other.distcp").write_bytes(content)
    index = pickle.loads((target / ".metadata").read_bytes())
    key = next(key for key in index.storage_data if key.fqn == KEY)
    index.storage_data[key] = type(index.storage_data[key])("other.distcp", 0, len(content))
    (target / ".metadata").write_bytes(pickle.dumps(index))
    return target


@pytest.mark.parametrize("case", list(RECORDS))
def test_records_of_all_kinds(case, dense, tmp_path, capsys):
    make, named = RECORDS[case]
    (tmp_path / "sources").mkdir()
    odd = with_record(dense, tmp_path / "sources", make())
    with little_memory():
        message = refused(expert_words({"a": dense, "b": odd}), tmp_path / "out", capsys)
    for text in [*named, str(odd / "other.distcp"), KEY]:
        assert text in message


def test_a_record_made_in_the_same_way_is_read(dense, tmp_path):
    """Else the refusals above would show nothing; a storage may also hold more than the tensor."""
    (tmp_path / "sources").mkdir()
    odd = with_record(dense, tmp_path / "sources", record(described()))
    same = mix({"a": odd, "b": odd}, tmp_path / "out", "--method", "average", "--output-format", "megatron")
    from tests.unit.mixing.checkpoints import tensors

    assert torch.equal(tensors(same)[KEY], NUMBERS)


@pytest.mark.parametrize("where", ["offset", "size", "hooks", "count"])
def test_a_description_cannot_run_code(where, dense, tmp_path, capsys):
    """A payload inside the description of a tensor's record."""
    (tmp_path / "sources").mkdir()
    mark = tmp_path / "sources" / "was here"
    odd = with_record(dense, tmp_path / "sources", record(described(**{where: Runs(mark)})))
    message = refused(expert_words({"a": dense, "b": odd}), tmp_path / "out", capsys)
    assert "mkdir" in message and "could run code" in message and KEY in message
    assert not mark.exists()


def test_overlapping_blocks_are_no_tensor(dense, tmp_path, capsys):
    """Blocks that cover a place twice and another never add up to the right number of elements all the same."""
    target = shutil.copytree(dense / "iter_0000010", tmp_path / "sources" / "odd")
    index = pickle.loads((target / ".metadata").read_bytes())
    entry = index.state_dict_metadata[KEY]
    (old,) = (key for key in index.storage_data if key.fqn == KEY)
    del index.storage_data[old]
    content = io.BytesIO()
    torch.save(torch.zeros(16), content)
    (target / "other.distcp").write_bytes(content.getvalue())
    chunk, info = type(entry.chunks[0]), next(iter(index.storage_data.values()))
    entry.chunks = [chunk(torch.Size((at,)), torch.Size((16,))) for at in (0, 8)]
    for number, part in enumerate(entry.chunks):
        key = type(old)(KEY, part.offsets, number)
        index.storage_data[key] = type(info)("other.distcp", 0, len(content.getvalue()))
    (target / ".metadata").write_bytes(pickle.dumps(index))
    message = refused(expert_words({"a": dense, "b": target}), tmp_path / "out", capsys)
    assert KEY in message and "two stored blocks overlap" in message


@pytest.mark.parametrize(
    "change",
    ["negative size", "fraction", "block outside", "other axes", "dtype of words", "position of a fraction"],
)
def test_an_index_of_nonsense(change, dense, tmp_path, capsys):
    target = shutil.copytree(dense / "iter_0000010", tmp_path / "sources" / "odd")
    index = pickle.loads((target / ".metadata").read_bytes())
    entry = index.state_dict_metadata[KEY]
    key = next(key for key in index.storage_data if key.fqn == KEY)
    if change == "negative size":
        object.__setattr__(entry, "size", (-32,))
    elif change == "fraction":
        object.__setattr__(entry, "size", (32.0,))
    elif change == "block outside":
        object.__setattr__(entry, "size", torch.Size((16,)))
    elif change == "other axes":
        object.__setattr__(entry, "size", torch.Size((32, 1)))
    elif change == "dtype of words":
        entry.properties.dtype = "float32"
    else:
        info = index.storage_data[key]
        index.storage_data[key] = type(info)(info.relative_path, float(info.offset), info.length)
    (target / ".metadata").write_bytes(pickle.dumps(index))
    message = refused(expert_words({"a": dense, "b": target}), tmp_path / "out", capsys)
    assert str(target) in message and ".metadata" in message


# --- files that programs run ----------------------------------------------------------------------------------


def test_nothing_in_a_model_folder_runs(tmp_path, capsys):
    """Pickled weights, code beside the model and a configuration that asks for it: never opened, never imported."""
    odd = llama_folder(tmp_path / "sources" / "odd", 1)
    mark = tmp_path / "sources" / "was here"
    payload = pickle.dumps(Runs(mark))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.model"):
        (odd / name).write_bytes(payload)
    (odd / "modeling_llama.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (odd / "tokenization_odd.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = json.loads((odd / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (odd / "config.json").write_text(json.dumps(config))
    (odd / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_odd.T", null]}}')
    words = ["--expert", f"a={odd}", "--expert", f"b={odd}", "--output", str(tmp_path / "out")]
    assert main(words) == 2 and "auto_map names code of the model's own" in capsys.readouterr().err
    del config["auto_map"]
    (odd / "config.json").write_text(json.dumps(config))
    out = mix({"a": odd, "b": odd}, tmp_path / "out", "--output-format", "hf", "--verify", "--allow-other-ids")
    assert not mark.exists()
    assert not list(out.glob("*.py")) and not list(out.glob("*.bin")), "nothing that runs is passed on"
    (odd / "model.safetensors").unlink()
    message = refused(expert_words({"a": odd, "b": odd}), tmp_path / "again", capsys)
    assert "pytorch_model.bin" in message and "can run code" in message and not mark.exists()
    pickle.loads(payload)
    assert mark.exists(), "else this payload would prove nothing"


# --- random damage --------------------------------------------------------------------------------------------


def fuzz(
    words: list[str], file: Path, span: Callable[[random.Random], int], expected: Path, cases: int, capsys: Any, seed=0
) -> int:
    """Damage a few bytes of a file at places that ``span`` chooses, mix, and put them right; returns the refusals.

    Every mix must end in one line, or in the numbers that the undamaged file gives.
    """
    honest, random_, refusals = file.read_bytes(), random.Random(seed), 0
    out = expected.parent / "fuzzed"
    for case in range(cases):
        content = bytearray(honest)
        for _ in range(random_.choice((1, 1, 1, 4))):
            content[span(random_)] ^= 1 << random_.randrange(8)
        file.write_bytes(content)
        capsys.readouterr()
        with little_memory():
            code = main([*words, "--output", str(out)])
        # The interpreter's own remark on a bytearray for which there was no memory; torch puts [rank0] before it where
        # an earlier test of this process had a process group.
        lines = [line for line in capsys.readouterr().err.splitlines() if "SystemError: dealloc" not in line]
        if code == 2:
            refusals += 1
            assert len(lines) == 1 and lines[0].startswith("error: "), (case, lines)
            assert not out.exists()
        else:
            assert code == 0 and same_numbers(out, expected), case
            shutil.rmtree(out)
    file.write_bytes(honest)
    assert sorted(os.listdir(expected.parent)) == ["expected", "sources"]
    return refusals


def same_numbers(left: Path, right: Path) -> bool:
    """Whether all files of numbers are equal, byte for byte."""
    files = [f.relative_to(right) for f in right.rglob("*") if f.suffix in (".distcp", ".safetensors")]
    return bool(files) and all((left / f).read_bytes() == (right / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_random_damage_in_a_model_folder(name, tmp_path, capsys):
    good, odd = (llama_folder(tmp_path / "sources" / n, i) for i, n in enumerate(("good", "odd")))
    words = [*expert_words({"good": good, "odd": odd}), "--output-format", "hf", "--workers", "1"]
    expected = mix({"good": good, "odd": odd}, tmp_path / "expected", "--output-format", "hf")
    content = (odd / name).read_bytes()
    header = len(content) if name == "config.json" else 8 + int.from_bytes(content[:8], "little")
    refusals = fuzz(words, odd / name, lambda random_: random_.randrange(header), expected, 50, capsys)
    assert refusals >= 25


def test_random_damage_in_an_index(dense, tmp_path, capsys):
    odd = shutil.copytree(dense / "iter_0000010", tmp_path / "sources" / "odd")
    words = [*expert_words({"good": dense / "iter_0000005", "odd": odd}), "--workers", "1"]
    expected = mix({"good": dense / "iter_0000005", "odd": odd}, tmp_path / "expected")
    size = (odd / ".metadata").stat().st_size
    refusals = fuzz(words, odd / ".metadata", lambda random_: random_.randrange(size), expected, 40, capsys)
    assert refusals >= 5


def test_random_damage_around_the_numbers(dense, tmp_path, capsys):
    """In the records' own headers, descriptions and directories; those of the numbers themselves nothing can tell."""
    (tmp_path / "sources").mkdir()
    honest = io.BytesIO()
    torch.save(NUMBERS, honest)
    content = honest.getvalue()
    odd = with_record(dense, tmp_path / "sources", content)
    words = [*expert_words({"good": dense / "iter_0000005", "odd": odd}), "--workers", "1"]
    expected = mix({"good": dense / "iter_0000005", "odd": odd}, tmp_path / "expected")
    begin = content.index(NUMBERS.numpy().tobytes())
    places = [*range(begin), *range(begin + 128, len(content))]
    refusals = fuzz(words, odd / "other.distcp", lambda random_: random_.choice(places), expected, 60, capsys)
    assert refusals >= 10
