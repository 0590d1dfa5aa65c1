"""Datasets of several domains: what goes where, that nothing else decides it, and that they appear whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.data import datasets, readers
from megatron_btx.data.domains import SPLITS, check_description
from megatron_btx.data.encoding import draw
from megatron_btx.data.indexed import Sink

DOCUMENTS = 400
Said = dict[str, Any]


def write_numbers(file: Path, numbers: list[int]) -> None:
    """JSONL in which document n is the number n, up to five times."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": " ".join([str(n)] * (n % 5 + 1))}) + "\n" for n in numbers))


@pytest.fixture
def said(tmp_path: Path) -> Said:
    """A domain that is split by shares, and one with files for every split."""
    write_numbers(tmp_path / "mixed.jsonl", list(range(DOCUMENTS)))
    write_numbers(tmp_path / "train" / "a.jsonl", list(range(DOCUMENTS)))
    write_numbers(tmp_path / "valid.jsonl", list(range(9)))
    (tmp_path / "train" / "LICENSE").write_text("all")
    return {
        "tokenizer": {"tokenizer-type": "NullTokenizer", "vocab-size": DOCUMENTS + 1},
        "seed": 7,
        "domains": {
            "math": {"text": [f"{tmp_path}/mixed.jsonl"], "shares": {"train": 0.7, "valid": 0.2, "test": 0.1}},
            "code": {"train": [f"{tmp_path}/train"], "valid": [f"{tmp_path}/valid.jsonl"]},
        },
    }


def make(output: Path, said: Said, workers: int = 1) -> Said:
    """Make the datasets; their summary."""
    return datasets.make_datasets(output, check_description(said), workers, quiet=True)


def documents(prefix: Path) -> list[list[int]]:
    """Token ids of every document, read by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_each_domain_has_its_own_key_and_its_own_way_with_bad_records(said: Said, tmp_path: Path, workers: int) -> None:
    (tmp_path / "body.jsonl").write_text('{"body": "1 2"}\nno JSON\n{"text": "3"}\n{"body": "4"}\n')
    own = {"train": [f"{tmp_path}/body.jsonl"], "json-key": "body", "on-bad-record": "skip"}
    said["domains"]["code"] = own
    summary = make(tmp_path / "out", said, workers)
    assert documents(tmp_path / "out" / "code.train") == [[1, 2, DOCUMENTS], [4, DOCUMENTS]]
    assert summary["left_out"] == {"code": "2 bad records: 1 not JSON, 1 no key"}
    assert sum(split["documents"] for split in summary["domains"]["math"].values()) == DOCUMENTS
    del own["on-bad-record"]
    with pytest.raises(InputError, match=r"body.jsonl:2: .*leave such records out with on-bad-record: skip"):
        make(tmp_path / "out", said, workers)
    own["json-key"] = "title"
    with pytest.raises(InputError, match=r"body.jsonl:1: no key 'title'.*; name the right key with json-key, "):
        make(tmp_path / "out", said, workers)


def test_every_document_is_whole_in_one_split_and_in_order(said: Said, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = make(out, said)
    found = {split: documents(out / f"math.{split}") for split in SPLITS}
    together = sorted(sum(found.values(), []), key=lambda ids: ids[0])
    assert together == [[n] * (n % 5 + 1) + [DOCUMENTS] for n in range(DOCUMENTS)]
    counts = {split: len(part) for split, part in found.items()}
    assert 240 < counts["train"] < 320 and 50 < counts["valid"] < 110 and 20 < counts["test"] < 65
    for split, part in found.items():
        assert part == sorted(part, key=lambda ids: ids[0])
        made = summary["domains"]["math"][split]
        assert (made["documents"], made["tokens"]) == (len(part), sum(map(len, part)))
        assert made["bin_sha256"] == hashlib.sha256((out / f"math.{split}.bin").read_bytes()).hexdigest()
    assert len(documents(out / "code.valid")) == 9 and not (out / "code.test.idx").exists()
    assert json.loads((out / "datasets.json").read_text()) == summary
    assert (out / "math.test.dataset.json").is_file()
    assert summary["sources"]["code"]["train"] == {
        "files": [str(tmp_path / "train" / "a.jsonl")],
        "bytes": (tmp_path / "train" / "a.jsonl").stat().st_size,
        "not_read": [str(tmp_path / "train" / "LICENSE")],
    }


def test_the_number_of_workers_and_the_other_domains_change_nothing(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_UNIT_BYTES", 256)
    make(tmp_path / "a", said)
    make(tmp_path / "b", said, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first = contents(tmp_path / "a")["math.valid.bin"]
    del said["domains"]["code"]
    make(tmp_path / "c", said)
    assert contents(tmp_path / "c")["math.valid.bin"] == first
    said["seed"] = 8
    make(tmp_path / "d", said)
    assert contents(tmp_path / "d")["math.valid.bin"] != first


def test_a_document_goes_to_one_split_wherever_and_however_often_it_stands(said: Said, tmp_path: Path) -> None:
    make(tmp_path / "a", said)
    write_numbers(tmp_path / "mixed.jsonl", [*reversed(range(DOCUMENTS)), *range(DOCUMENTS)])
    said["domains"] = {"other": said["domains"]["math"]}
    make(tmp_path / "b", said)
    for split in SPLITS:
        first, second = documents(tmp_path / "a" / f"math.{split}"), documents(tmp_path / "b" / f"other.{split}")
        assert second == [*reversed(first), *first]


def test_draws_are_even_and_known() -> None:
    """The number for a text stays the same from version to version: else tests would hold what was trained on."""
    drawn = [draw(str(n), 1234) for n in range(4000)]
    assert min(drawn) >= 0 and max(drawn) < 1 and abs(sum(drawn) / 4000 - 0.5) < 0.02
    assert draw("a text", 1234) == int(hashlib.blake2b(b"1234\na text", digest_size=6).hexdigest(), 16) / 2**48
    shares = {"train": 0.5, "valid": 0.3, "test": 0.2}
    chosen = [datasets.choose_split(number, shares) for number in (0.0, 0.19, 0.21, 0.49, 0.51, 0.999)]
    assert chosen == ["test", "test", "valid", "valid", "train", "train"]
    assert datasets.choose_split(0.9999999, {"valid": 0.5, "train": 0.4999995}) == "train"


def domain(name: str, content: Any) -> Callable[[Said], None]:
    return lambda said: said["domains"].__setitem__(name, content)


def text(**shares: float) -> Said:
    return {"text": ["HERE/mixed.jsonl"], "shares": shares}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (domain("math", text(train=1.0, dev=0.5)), "domains.math.shares.dev"),
        (domain("math", text(train=0.5, test=0.4)), "domains.math.shares: found shares that sum to 0.9, expected 1"),
        (domain("math", text(train=1.5, test=-0.5)), "domains.math.shares.test: found -0.5"),
        (domain("math", text(train=1 - 1e-9, test=1e-9)), "math: no document for its test set in 1 file"),
        (domain("math", {"text": ["x"]}), "domains.math: expected text with shares"),
        (domain("math", {"train": ["x"], "shares": {"train": 1.0}}), "domains.math: expected text with shares"),
        (domain("math", {"train": ["x"], "text": ["x"]}), "domains.math: found text and files"),
        (domain("math", {"train": "x"}), "domains.math.train"),
        (domain("math", {}), "domains.math: found no files"),
        (domain("../math", text(train=1.0)), "domains.../math: not a name; expected letters, digits"),
        (domain("math", {"train": ["/nowhere/x.jsonl"]}), "domains.math.train: /nowhere/x.jsonl: no such file"),
        (domain("math", {"train": ["HERE/train"]}), "a.jsonl is text of domains.math.train, too"),
        (domain("math", {"train": ["HERE/mixed.jsonl"]}), "code.train would hold the same text as math.train"),
        (domain("code", {"train": ["HERE/train"], "test": ["HERE/train"]}), "is text of domains.code.train, too"),
        (domain("code", {"train": ["HERE/bad.jsonl"]}), "bad.jsonl:1: "),
        (lambda said: said["tokenizer"].update({"tokenizer-type": "Other"}), "--tokenizer-type Other: unknown"),
        (lambda said: said["tokenizer"].update({"vocab-file": "x"}), "tokenizer.vocab-file: this flag is not known"),
        (lambda said: said["tokenizer"].pop("tokenizer-type"), "tokenizer.tokenizer-type is missing"),
        (lambda said: said.pop("tokenizer"), "tokenizer: "),
        (lambda said: said.update(domains={}), "domains: "),
        (lambda said: said.update(more=1), "more: "),
        (lambda said: said.update(seed="7"), "seed: "),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_leave_nothing(
    change: Callable[[Said], None], message: str, said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    change(said)
    words = json.dumps(said).replace("HERE", str(tmp_path))
    assert datasets.main(["--output", str(tmp_path / "out"), "--description", words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


def test_a_failure_at_the_end_leaves_no_summary_and_what_fails_before_leaves_the_old_datasets(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out, said)
    before = contents(out)
    said["seed"] = 8
    with monkeypatch.context() as patched:
        patched.setattr(Sink, "write_index", _fail)
        with pytest.raises(OSError, match="full"):
            make(out, said)
    assert contents(out) == before
    with monkeypatch.context() as patched:
        patched.setattr(Sink, "publish", _fail)
        with pytest.raises(OSError, match="full"):
            make(out, said)
    assert "datasets.json" not in contents(out)
    make(out, said)
    assert "datasets.json" in contents(out)


def _fail(*_: object) -> None:
    raise OSError("full")


def test_the_command_takes_a_file_or_the_json_itself(
    said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "description.json"
    file.write_text(json.dumps(said))
    for place, description in (("a", str(file)), ("b", json.dumps(said))):
        assert datasets.main(["--output", str(tmp_path / place), "--description", description]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    printed = capsys.readouterr().out
    assert "code: train 400 documents" in printed and "not read: 1 file (LICENSE)" in printed
    for wrong in ("{", "[1]", "/nowhere"):
        assert datasets.main(["--output", str(tmp_path / "c"), "--description", wrong]) == 2
    with pytest.raises(InputError, match="--workers 0"):
        make(tmp_path / "c", said, workers=0)
