"""What is trained and measured on is what was tokenized, token by token, whatever token a tokenizer pads with."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.training import global_vars

from megatron_btx.data import preprocess
from megatron_btx.data.foreign_ids import ForeignIdError, check_batch
from megatron_btx.data.texts import start_of
from megatron_btx.data.tokenizers import TokenizerSettings, _namespace
from megatron_btx.data.training import datasets_for
from megatron_btx.ground.stopping import Stopping
from megatron_btx.model.step import batches_of

LENGTH, SEQUENCES = 16, 40
WORDS = ["<zero>", "<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(30))]
ENDED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS = {
    "pad none": ENDED,
    "pad of its own": ENDED | {"pad_token": "<pad>"},
    "pad ends documents": ENDED | {"pad_token": "</s>"},
    "pad begins texts": ENDED | {"pad_token": "<s>"},
    "pad is unknown": ENDED | {"pad_token": "<unk>"},
    "pad stands in texts": ENDED | {"pad_token": "w3"},
    "pad is 0": ENDED | {"pad_token": "<zero>"},
    "pad is added": ENDED | {"pad_token": "[PAD]"},
    "nothing ends": {"unk_token": "<unk>", "pad_token": "<unk>"},
    "nothing ends, pad in texts": {"unk_token": "<unk>", "pad_token": "w3"},
}


def tokenizer(folder: Path, special: dict[str, str]) -> Path:
    """A tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def pieces(file: Path) -> Path:
    """A SentencePiece model whose first piece pads, which keeps it apart from all others."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([" ".join(WORDS[5:])] * 20), model_writer=(file.open("wb")), vocab_size=60,
        hard_vocab_limit=False, pad_id=0, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return file


def write_texts(file: Path) -> Path:
    """Documents of several lengths with every word, special ones among them."""
    lines = []
    for number in range(60):
        words = [WORDS[(number * 7 + place) % len(WORDS)] for place in range(number % 9 + 3)]
        lines.append(json.dumps({"text": " ".join(words)}))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TokenizerSettings, Path]]:
    """The settings and the dataset of every tokenizer."""
    folder = tmp_path_factory.mktemp("samples")
    texts = write_texts(folder / "t.jsonl")
    result = {}
    for name, special in TOKENIZERS.items():
        place = folder / name.replace(" ", "-")
        settings = TokenizerSettings("HuggingFaceTokenizer", str(tokenizer(place, special)))
        end = ["--append-eod"] if "eos_token" in special else []
        result[name] = settings, make(texts, place, settings, end)
    settings = TokenizerSettings("SentencePieceTokenizer", str(pieces(folder / "tokens.model")))
    result["SentencePiece"] = settings, make(texts, folder / "pieces", settings, ["--append-eod"])
    return result


def make(texts: Path, place: Path, settings: TokenizerSettings, flags: list[str]) -> Path:
    kind = ["--tokenizer-type", settings.tokenizer_type, "--tokenizer-model", str(settings.tokenizer_model)]
    assert preprocess.main(["--input", str(texts), "--output-prefix", str(place / "d"), *kind, *flags]) == 0
    return place / "d_text_document"


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Megatron's groups, of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run_of(settings: TokenizerSettings, data: Path, cache: Path, **changes: object) -> Namespace:
    """The arguments of a run, known to Megatron with their tokenizer."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = Namespace(
        **vars(_namespace(settings)), seed=1, seq_length=LENGTH, split=None, data_path=None, data_args_path=None,
        per_split_data_args_path=None, train_data_path=[str(data)], valid_data_path=[str(data)], test_data_path=None,
        multiple_validation_sets=False, full_validation=False, num_dataset_builder_threads=1, mmap_bin_files=True,
        data_cache_path=str(cache), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask_in_dataloader=True, context_parallel_size=1, mock_data=False, padded_vocab_size=128,
        fim_data=False, micro_batch_size=1, data_parallel_size=1, pipeline_model_parallel_size=1, btx_allow_change=[],
        curr_iteration=0,
    )  # fmt: skip
    vars(args).update(changes)
    global_vars._GLOBAL_ARGS = args
    global_vars._GLOBAL_TOKENIZER = build_tokenizer(args)
    return args


@pytest.fixture
def forgotten() -> Iterator[None]:
    yield
    global_vars._GLOBAL_ARGS = global_vars._GLOBAL_TOKENIZER = None


def check_sample(sample: dict[str, torch.Tensor], text: np.ndarray, args: Namespace) -> None:
    """Tokens, labels, loss, positions and what is seen, said anew from the text."""
    tokens, eod = text[:-1], global_vars.get_tokenizer().eod
    assert np.array_equal(sample["tokens"], tokens)
    assert np.array_equal(sample["labels"], text[1:])
    ends = np.zeros(LENGTH, dtype=bool) if eod is None else tokens == eod
    assert np.array_equal(sample["loss_mask"], np.where(args.eod_mask_loss & ends, 0.0, 1.0))
    document = np.cumsum(ends) - ends
    starts = np.array([np.argmax(document == number) for number in document])
    assert np.array_equal(sample["position_ids"], np.arange(LENGTH) - args.reset_position_ids * starts)
    seen = np.tril(np.ones((LENGTH, LENGTH), dtype=bool))
    if args.reset_attention_mask:
        seen &= document[:, None] == document[None, :]
    assert np.array_equal(sample["attention_mask"][0], ~seen)


FLAGS = [
    {},
    {"eod_mask_loss": True},
    {"reset_position_ids": True},
    {"reset_attention_mask": True},
    {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True},
]


@pytest.mark.parametrize("name", [*TOKENIZERS, "SentencePiece"])
def test_every_sample_is_the_text(name, made, one_process, forgotten, tmp_path: Path):
    """In training, in Megatron's validation and in ours, with all flags of documents' ends."""
    settings, data = made[name]
    stream = np.fromfile(f"{data}.bin", dtype=np.uint16).astype(np.int64)
    for flags in FLAGS:
        args = run_of(settings, data, tmp_path / "cache", **flags)
        eod = global_vars.get_tokenizer().eod
        if eod is not None:
            assert (stream == eod).sum() >= 60
        train, valid, _ = datasets_for(Stopping())([SEQUENCES, 7, 0])
        for dataset in (train, valid):
            order = np.concatenate([dataset.dataset[int(number)] for number in dataset.document_index])
            place = {int(start): number for number, start in enumerate(dataset.shuffle_index)}
            for number in range(len(dataset)):
                text = order[number * LENGTH : (number + 1) * LENGTH + 1].astype(np.int64)
                check_sample(dataset[place[number]], text, args)
        measured = batches_of(start_of(str(data), len(stream)), "text")
        assert len(measured) == (len(stream) - 1) // LENGTH
        for number, batch in enumerate(measured):
            sample = {key: value[0] for key, value in batch.items()}
            check_sample(sample, stream[number * LENGTH : (number + 1) * LENGTH + 1], args)


def test_a_number_that_no_token_has_is_no_padding(made, one_process, forgotten, tmp_path: Path):
    """-1, which Megatron takes for padding, is refused in training as it is in evaluation."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.int32)
    builder.add_document(torch.tensor([5, -1] * LENGTH), [2 * LENGTH])
    builder.finalize(f"{tmp_path}/d.idx")
    args = run_of(made["pad none"][0], tmp_path / "d", tmp_path / "cache", valid_data_path=None)
    train, _, _ = datasets_for(Stopping())([1, 0, 0])
    with pytest.raises(ForeignIdError, match="has the id -1"):
        check_batch({name: value[None] for name, value in train[0].items()}, args, training=True)
    with pytest.raises(ForeignIdError, match="holds the token id -1"):
        batches_of(start_of(f"{tmp_path}/d", 2 * LENGTH), "text")
