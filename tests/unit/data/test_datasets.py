"""Datasets of several domains: what goes where, and that nothing else decides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.data import datasets
from megatron_btx.ground.errors import InputError

DOCUMENTS = 400


@pytest.fixture
def description(tmp_path: Path) -> dict[str, Any]:
    """A domain that is split by shares, and one with files for every split; document n is the number n, n + 1 times."""
    for name in ("mixed", "train", "valid"):
        lines = (json.dumps({"text": " ".join([str(n)] * (n % 5 + 1))}) for n in range(DOCUMENTS))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "tokenizer": {"tokenizer-type": "NullTokenizer", "vocab-size": DOCUMENTS + 1},
        "seed": 7,
        "domains": {
            "math": {"text": [f"{tmp_path}/mixed.jsonl"], "shares": {"train": 0.7, "valid": 0.2, "test": 0.1}},
            "code": {"train": [f"{tmp_path}/train.jsonl"], "valid": [f"{tmp_path}/valid.jsonl"]},
        },
    }


def documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def test_every_document_is_in_one_split_and_whole(description: dict[str, Any], tmp_path: Path) -> None:
    summary = datasets.make_datasets(tmp_path / "out", description, quiet=True)
    found = {split: documents(tmp_path / "out" / f"math.{split}") for split in ("train", "valid", "test")}
    together = sorted((document for part in found.values() for document in part), key=lambda ids: ids[0])
    assert together == [[n] * (n % 5 + 1) + [DOCUMENTS] for n in range(DOCUMENTS)]
    counts = {split: len(part) for split, part in found.items()}
    assert 240 < counts["train"] < 320 and 50 < counts["valid"] < 110 and 20 < counts["test"] < 65
    for split, part in found.items():
        assert [document[0] for document in part] == sorted(document[0] for document in part)
        assert summary["math"][split]["documents"] == len(part)
        assert summary["math"][split]["tokens"] == sum(map(len, part))
    assert len(documents(tmp_path / "out" / "code.valid")) == DOCUMENTS
    assert not (tmp_path / "out" / "code.test.idx").exists()
    written = json.loads((tmp_path / "out" / "datasets.json").read_text())
    assert written["domains"] == json.loads(json.dumps(summary)) and written["tokenizer"] == description["tokenizer"]


def test_workers_and_the_other_domains_decide_nothing_and_the_seed_does(
    description: dict[str, Any], tmp_path: Path
) -> None:
    first = datasets.make_datasets(tmp_path / "a", description, quiet=True)["math"]
    del description["domains"]["code"]
    assert datasets.make_datasets(tmp_path / "b", description, workers=2, quiet=True)["math"] == first
    description["seed"] = 8
    assert datasets.make_datasets(tmp_path / "c", description, quiet=True)["math"] != first


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ({"text": ["x"], "shares": {"train": 1, "dev": 1}}, "domains.math: found dev; expected text with shares"),
        ({"text": ["x"]}, "domains.math: found text; expected"),
        ({}, "domains.math: found no files"),
        ({"train": ["/nowhere/x.jsonl"]}, "/nowhere/x.jsonl"),
    ],
)
def test_descriptions_are_refused(
    domain: dict[str, Any], said: str, description: dict[str, Any], tmp_path: Path
) -> None:
    description["domains"]["math"] = domain
    with pytest.raises(InputError, match=said):
        datasets.make_datasets(tmp_path / "out", description, quiet=True)
    assert not (tmp_path / "out" / "datasets.json").exists()


def test_a_split_without_a_document_is_refused(description: dict[str, Any], tmp_path: Path) -> None:
    """Training would repeat its tokens for ever."""
    description["domains"]["math"]["shares"] = {"train": 1.0, "test": 1e-9}
    with pytest.raises(InputError, match="math: no document for its test set in 1 file"):
        datasets.make_datasets(tmp_path / "out", description, quiet=True)


def test_a_tokenizers_flag_of_no_effect_is_refused(description: dict[str, Any], tmp_path: Path) -> None:
    description["tokenizer"]["vocab-file"] = "x"
    with pytest.raises(InputError, match=r"tokenizer\.vocab-file: this flag is not known here"):
        datasets.make_datasets(tmp_path / "out", description, quiet=True)


def test_the_command_takes_a_file_or_the_json_itself(
    description: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "description.json"
    file.write_text(json.dumps(description))
    for place, said in (("a", str(file)), ("b", json.dumps(description))):
        assert datasets.main(["--output", str(tmp_path / place), "--description", said]) == 0
    first, second = ((tmp_path / place / "datasets.json").read_text() for place in ("a", "b"))
    assert first == second and "math: train 2" in capsys.readouterr().out
    assert datasets.main(["--output", str(tmp_path / "c"), "--description", "[1]"]) == 2
