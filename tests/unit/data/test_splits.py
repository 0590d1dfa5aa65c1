"""Splits that Megatron would never finish, or not past the last step: seen from lengths alone, and cut as it cuts."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

from megatron_btx.common.errors import InputError
from megatron_btx.data.splits import Dataset, check_splits, splits_of, wanted_sequences

LENGTH = 16


def write(prefix: Path, lengths: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(torch.arange(length, dtype=torch.int32), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prefixes of datasets: 300 documents, 5, one, one that is shorter than a sequence, and three without a token."""
    folder = tmp_path_factory.mktemp("datasets")
    lengths = {"many": [40] * 300, "few": [40] * 5, "one": [40], "short": [9], "blank": [40, 40, 0, 0, 0]}
    return {name: write(folder / name, sizes) for name, sizes in lengths.items()}


def arguments(**given: object) -> Namespace:
    """Megatron's arguments, as far as they say what is read."""
    names = "data_path data_args_path train_data_path valid_data_path test_data_path per_split_data_args_path split"
    names += " train_samples start_eval_at_iter"
    values = dict.fromkeys(names.split()) | {"seq_length": LENGTH, "global_batch_size": 2, "eval_global_batch_size": 2}
    values |= {"train_iters": 4, "eval_iters": 0, "eval_interval": 2, "skip_train": False, "full_validation": False}
    return Namespace(**values | {"dataloader_type": "single"} | given)


REFUSED = [
    ({"data_path": "many", "split": "969, 30, 1"}, "--data-path with --split 969, 30, 1: .*none to test"),
    ({"data_path": "many", "split": "1000,1"}, "leaves none to validation"),
    ({"data_path": "one", "split": "1,1"}, "leaves none to training"),
    ({"data_path": "blank", "split": "2,3"}, "of which 2 to 5 hold no token"),
    (
        {"data_path": "1 many 1 few", "split": "95,5", "eval_iters": 1},
        "few has 5 sequences .* leaves none to validation",
    ),
    ({"data_path": "many few one", "split": "9,1"}, "one has 1 sequences .* leaves none to validation"),
    ({"data_path": "many", "split": "0,1"}, "nothing to train on"),
    ({"data_path": "many", "split": "1", "eval_iters": 2}, "--eval-iters 2: there is no validation data"),
    ({"data_path": "many", "split": "0,0,0"}, "--split 0,0,0: expected"),
    ({"data_path": "many", "split": "9,1,1,1"}, "--split 9,1,1,1: expected up to three shares"),
    ({"data_path": "many", "split": "a"}, "--split a"),
    # Megatron takes the digits: -1 would be 1, and 1e-3 two shares.
    ({"data_path": "many", "split": "-1,1"}, "--split -1,1: expected up to three shares"),
    ({"data_path": "many", "split": "nan,1"}, "--split nan,1: expected up to three shares"),
    ({"data_path": "many", "split": "0.999,1e-3"}, "--split 0.999,1e-3: expected up to three shares"),
    ({"data_path": "1 many 2 few", "split": "8,2"}, "nothing of the validation part is asked for"),
    ({"data_path": "1 many 2 few", "split": "8,2", "full_validation": True}, "leave the weights out"),
    ({"data_path": "0 many 1 few", "split": "1"}, "weight 0; expected above 0"),
    ({"data_path": "nan many 1 few", "split": "1"}, "weight nan"),
    ({"train_data_path": "many", "eval_iters": 1}, "--eval-iters 1: there is no validation data"),
    ({"train_data_path": "many", "full_validation": True}, "--full-validation: there is no validation data"),
    ({"valid_data_path": "many", "eval_iters": 1}, "nothing to train on"),
    ({"train_data_path": "few short one"}, "training part of .*short has 9 tokens, no sequence of 16"),
    ({"train_data_path": "few one few"}, "has 26 sequences of 16 for training, where 200 are"),
    ({"train_data_path": "many", "valid_data_path": "one one one", "eval_iters": 2}, "6 sequences .* where 12 are"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_refused(given, said, data):
    """One line that names the flags, the dataset and what would help."""
    words = {"train_iters": 100} if "200 are" in said else {}
    for name, value in given.items():
        words[name] = [data.get(word, word) for word in value.split()] if name.endswith("data_path") else value
    with pytest.raises(InputError, match=said):
        check_splits(arguments(**words))


ACCEPTED = [
    {"data_path": "many", "split": "98,1,1", "eval_iters": 5},
    {"data_path": "many", "split": "100,0,0"},
    {"data_path": "many", "split": "[98; 1; 1]", "eval_iters": 5},
    {"data_path": "many", "split": "969,30,0", "eval_iters": 5},
    {"data_path": "1 many 2 few", "split": "8,2", "eval_iters": 5},
    {"data_path": "blank", "split": "1"},
    {"train_data_path": "short"},
    {"train_data_path": "1 short 3 one"},
    {"train_data_path": "many few one"},
    {"train_data_path": "many", "valid_data_path": "few", "eval_iters": 5},
    {"train_data_path": "many", "valid_data_path": "few", "full_validation": True},
]


@pytest.mark.parametrize("given", ACCEPTED)
def test_accepted_and_built(given, data, tmp_path):
    """What passes, Megatron itself builds at once, with as many sequences of each split as are asked for."""
    words = {
        name: [data.get(word, word) for word in value.split()] if name.endswith("data_path") else value
        for name, value in given.items()
    }
    args = arguments(**words)
    check_splits(args)
    splits = {split.name: split for split in splits_of(args)}
    by_split = [splits[name].blend if name in splits else None for name in ("train", "valid", "test")]
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=by_split[0] if args.data_path else None,
        blend_per_split=None if args.data_path else by_split,
        split=args.split,
        path_to_cache=str(tmp_path),
        tokenizer=NullTokenizer(96),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    wanted = wanted_sequences(args)
    built = BlendedMegatronDatasetBuilder(GPTDataset, list(wanted.values()), lambda: True, config).build()
    for (name, count), dataset in zip(wanted.items(), built, strict=True):
        assert (dataset is not None) == (name in splits)
        assert dataset is None or len(dataset) >= (count or 1)


@pytest.mark.parametrize("split", ["969,30,1", "98,1,1", "1,1", "0.5,0.25,0.25", "7,3", "1,2,3"])
@pytest.mark.parametrize("count", [1, 2, 5, 33, 34, 300])
def test_sequences_are_cut_as_megatron_cuts(split, count):
    """Rounding and all: the sequences that Megatron's own builder takes."""
    args = arguments(data_path=["x"], split=split)
    dataset = Dataset("x", np.ones(count, dtype=np.int32))
    for part in splits_of(args):
        start, end = (int(round(share * float(count))) for share in part.part)
        assert dataset.sequences(part.part) == (start, end) and dataset.tokens(part.part) == end - start


def test_files_of_data_arguments(data, tmp_path):
    """Both kinds are read, and one that is none is named."""
    listed, per_split = tmp_path / "list", tmp_path / "splits.json"
    listed.write_text(f"1 {data['many']}\n2 {data['few']}")
    per_split.write_text(json.dumps({"train": [data["many"]], "valid": data["few"], "test": None}))
    check_splits(arguments(data_args_path=str(listed), split="8,2", eval_iters=1))
    check_splits(arguments(per_split_data_args_path=str(per_split), eval_iters=1))
    with pytest.raises(InputError, match=f"--data-args-path {listed}: --split is missing"):
        check_splits(arguments(data_args_path=str(listed)))
    for args in (
        arguments(data_args_path=str(tmp_path / "none"), split="1"),
        arguments(per_split_data_args_path=str(listed)),
        arguments(per_split_data_args_path=str(tmp_path / "none")),
    ):
        with pytest.raises(InputError, match=f"{tmp_path}/.*: cannot be read as lists of datasets"):
            check_splits(args)


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "null",
        '{"train": 5, "valid": null, "test": null}',
        '{"train": [["a"]], "valid": null, "test": null}',
        '{"train": ["a"]}',
        "[" * 100_000,
        '{"train": [' + "9" * 5000 + "]}",
    ],
    ids=lambda content: content[:30],
)
def test_lists_of_datasets_that_are_none(content, tmp_path):
    """One line, never a traceback."""
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(InputError, match="splits.json: cannot be read as lists of datasets"):
        splits_of(arguments(per_split_data_args_path=str(tmp_path / "splits.json")))
