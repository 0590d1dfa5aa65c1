"""What is trained and measured on is what was tokenized, token by token, whatever token a tokenizer pads with."""

from __future__ import annotations

import json
import os
import signal
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.training import global_vars

from megatron_btx.common.errors import InputError
from megatron_btx.data import preprocess, training
from megatron_btx.data.texts import start_of
from megatron_btx.data.tokenizers import TokenizerSettings, _namespace
from megatron_btx.data.training import ForeignIdError, check_batch, check_data_files, datasets_for
from megatron_btx.distributed.abort import Stopping
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


NUMBERS = TokenizerSettings("NullTokenizer", vocab_size=96)


def write_numbers(prefix: Path, lengths: list[int]) -> Path:
    """A dataset of documents of these lengths."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number, length in enumerate(lengths):
        builder.add_document(torch.arange(number, number + length) % 95, [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def orders(data: Path, cache: Path | None, **changes: object) -> list[list[np.ndarray]]:
    """What a start reads of every split: documents, sequences and their shuffle."""
    changes = {"data_cache_path": cache and str(cache), **changes}
    run_of(NUMBERS, data, data, **changes)
    built = [dataset for dataset in datasets_for(Stopping())([SEQUENCES, 7, 0]) if dataset is not None]
    return [[np.array(d.document_index), np.array(d.sample_index), np.array(d.shuffle_index)] for d in built]


def same(some: list[list[np.ndarray]], others: list[list[np.ndarray]]) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("place", ["given", "beside"])
def test_a_dataset_made_again_has_an_order_of_its_own(place, one_process, forgotten, tmp_path: Path):
    """Whatever lies in the cache; also where size and time of the files are those of the older ones."""
    cache = tmp_path / "cache" if place == "given" else None
    data = write_numbers(tmp_path / "d", [30] * 40)
    first, stamps = orders(data, cache), os.stat(f"{data}.idx")
    for number, lengths in enumerate(([30] * 10, [30] * 200, [20, 40] * 20)):
        write_numbers(data, lengths)
        os.utime(f"{data}.idx", ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
        found = orders(data, cache)
        assert not same(found, first) and same(found, orders(data, tmp_path / f"new{number}"))
    assert os.stat(f"{data}.idx").st_size == stamps.st_size
    write_numbers(data, [30] * 40)
    assert same(orders(data, cache), first)


def test_the_order_is_megatrons(one_process, forgotten, tmp_path: Path):
    """A run that began with Megatron's own cache goes on in the same order, and its files do no harm."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.training import get_tokenizer

    one, two = write_numbers(tmp_path / "one", [30, 7] * 40), write_numbers(tmp_path / "two", [50] * 9)
    blend = {"train_data_path": ["3", str(one), "1", str(two)], "valid_data_path": [str(two)]}
    run_of(NUMBERS, one, tmp_path / "cache", **blend)
    ours = datasets_for(Stopping())([SEQUENCES, 7, 0])
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH,
        blend_per_split=[([str(one), str(two)], [3, 1]), ([str(two)], None), None],
        path_to_cache=str(tmp_path / "cache"), tokenizer=get_tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=True,
    )  # fmt: skip
    for _ in ("made", "read"):
        theirs = BlendedMegatronDatasetBuilder(GPTDataset, [SEQUENCES, 7, 0], lambda: True, config).build()
        for mine, stock in zip(ours[:2], theirs[:2], strict=True):
            assert len(mine) == len(stock)
            for number in range(len(mine)):
                assert all(
                    torch.equal(torch.as_tensor(v), torch.as_tensor(stock[number][k])) for k, v in mine[number].items()
                )


def damages(file: Path) -> Iterator[None]:
    """A file as a full disk, a kill or a bad disk leave it."""
    whole = file.read_bytes()
    file.unlink()
    yield
    for content in (
        b"",
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        whole * 2,
    ):
        file.write_bytes(content)
        yield


def test_a_damaged_order_is_made_anew(one_process, forgotten, tmp_path: Path):
    """Each file, however it was damaged; afterwards all of them are whole."""
    data, cache = write_numbers(tmp_path / "d", [30] * 40), tmp_path / "cache"
    first = orders(data, cache)
    files = {file: file.read_bytes() for file in sorted(cache.iterdir())}
    assert len(files) == 8
    for file, whole in files.items():
        for _ in damages(file):
            assert same(orders(data, cache), first)
            assert file.suffix == ".txt" or file.read_bytes() == whole
    assert sorted(cache.iterdir()) == list(files)


def test_killed_while_it_writes(tmp_path: Path):
    """At each of the moments at which a file gets its name; and several processes at once."""
    made = (np.arange(40), np.arange(60).reshape(30, 2), np.arange(29)[::-1])
    replace = os.replace

    def child(start: str, calls: int) -> int:
        """Write in a process that dies when it gives the last of so many files its name."""
        process = os.fork()
        if process:
            return process
        left = iter(range(calls - 1, -1, -1))

        def dying(source: str, target: str) -> None:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        training.keep_order(start, made, "what")
        os._exit(0)

    for calls in range(1, 5):
        start = f"{tmp_path}/{calls}-"
        assert os.waitpid(child(start, calls), 0)[1] == signal.SIGKILL
        assert training.read_order(start) is None
        training.keep_order(start, made, "what")
        assert same([training.read_order(start)], [made])
    children = [child(f"{tmp_path}/together-", 99) for _ in range(6)]
    assert [os.waitpid(process, 0)[1] for process in children] == [0] * 6
    assert same([training.read_order(f"{tmp_path}/together-")], [made])


def test_where_nothing_can_be_written(one_process, forgotten, tmp_path: Path, capsys):
    """A folder that was asked for is refused; beside the data the order is not kept, and that is said."""
    data = write_numbers(tmp_path / "d", [30] * 40)
    (tmp_path / "d").write_text("no folder")
    first = orders(data, tmp_path / "cache")
    assert same(orders(data, None), first)
    assert "the order of sequences cannot be kept there ([Errno 20] Not a directory" in capsys.readouterr().out
    for place in (tmp_path / "d", tmp_path / "d" / "cache"):
        args = run_of(NUMBERS, data, place)
        with pytest.raises(InputError, match=f"--data-cache-path {place}: .* is no folder that can be written to"):
            check_data_files(args)
