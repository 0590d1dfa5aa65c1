"""Text files into indexed datasets: exact round trips, the same bytes however it is done, one line for bad input."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest
import sentencepiece

from examples.quickstart.corpora import math_problems, vocabulary
from megatron_btx.data import encoding, preprocess, readers, tokenizers
from megatron_btx.data.encoding import in_order
from megatron_btx.data.tokenizers import TokenizerSettings

TEXTS = (
    "The first document.\n\nIt has two paragraphs.",
    "def f(x):\n    if x:\n        return 3411\n\treturn 'tab'\n",
    "Umlauts äöü, a snowman ☃, and  two spaces.",
    " starts and ends with a space ",
)
EOD = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    vocabulary.train([*math_problems.generate(1, 0, 60_000), *TEXTS], path, 600)
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """The texts as JSONL."""
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """One object with the key "text" on each line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def arguments(model: Path, inputs: Sequence[Path | str], prefix: Path, *more: str) -> list[str]:
    """A command line."""
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    return ["--input", *map(str, inputs), "--output-prefix", str(prefix), *tokenizer, *more]


def documents(prefix: str) -> list[list[int]]:
    """Token ids of every document, read by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def both_files(prefix: str) -> tuple[bytes, bytes]:
    """The dataset's bytes."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def text_of(model: Path, ids: list[int]) -> str:
    """The text behind token ids."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).decode(ids)


def test_tokens_decode_to_the_text_and_end_with_eod(model: Path, jsonl: Path, tmp_path: Path) -> None:
    settings = TokenizerSettings("SentencePieceTokenizer", str(model))
    summary = preprocess.preprocess([str(jsonl)], str(tmp_path / "out"), settings, append_eod=True)
    assert summary.prefixes == (str(tmp_path / "out_text_document"),)
    found = documents(summary.prefixes[0])
    assert tokenizers.load(settings).eod == EOD
    assert all(ids[-1] == EOD and EOD not in ids[:-1] for ids in found)
    assert tuple(text_of(model, ids[:-1]) for ids in found) == TEXTS
    assert (summary.documents, summary.empty_documents) == (len(TEXTS), 0)
    assert summary.tokens == sum(map(len, found))
    assert summary.output_bytes == 2 * summary.tokens  # 16 bits suffice for 600 pieces


@pytest.mark.parametrize("vocab_size", [96, 70_000])
def test_the_bytes_are_those_of_megatrons_own_writer(vocab_size: int, tmp_path: Path) -> None:
    """For tokens of two bytes and of four."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = [" ".join(map(str, range(vocab_size - number, vocab_size))) for number in range(2, 40)]
    write_jsonl(tmp_path / "numbers.jsonl", texts)
    settings = TokenizerSettings("NullTokenizer", vocab_size=vocab_size)
    made = preprocess.preprocess([str(tmp_path / "numbers.jsonl")], str(tmp_path / "ours"), settings, append_eod=True)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        ids = [int(word) for word in text.split()]  # the last one is the end of the document already
        builder.add_document(numpy.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert both_files(made.prefixes[0]) == both_files(str(tmp_path / "theirs"))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "NullTokenizer"])
def test_the_tokens_are_those_of_megatrons_own_tokenizer(kind: str, model: Path) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    settings, texts = TokenizerSettings("NullTokenizer", vocab_size=96), ["7 95 0"]
    if kind == "SentencePieceTokenizer":
        settings = TokenizerSettings(kind, str(model))
        texts = [*TEXTS, "", " ", "  two  blanks ", "a\tb\n\nc", "</s> <unk> ▁", "\u00e4\U0001f600\u0000"]
    ours, theirs = tokenizers.load(settings), build_tokenizer(tokenizers._namespace(settings))
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    for text in texts:
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_a_small_text_needs_neither_torch_nor_megatron(model: Path, jsonl: Path, tmp_path: Path) -> None:
    """Importing them takes most of the time that a small text needs."""
    words = arguments(model, [jsonl], tmp_path / "out", "--append-eod")
    program = (
        "import sys; from megatron_btx.data import preprocess; "
        f"assert preprocess.main({words!r}) == 0; assert not {{'torch', 'megatron.core'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_without_append_eod_documents_have_none(model: Path, jsonl: Path, tmp_path: Path) -> None:
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out")) == 0
    assert all(EOD not in ids for ids in documents(str(tmp_path / "out_text_document")))


def test_workers_do_not_change_a_byte(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_UNIT_BYTES", 4096)  # many more units than are ever in flight
    texts = [f"{number} {text}" for number in range(1000) for text in TEXTS]
    big = write_jsonl(tmp_path / "big.jsonl", texts)
    assert len(list(readers.cut(big, ["text"]))) > 40
    for workers in ("1", "2"):
        assert preprocess.main(arguments(model, [big], tmp_path / workers, "--append-eod", "--workers", workers)) == 0
    assert both_files(str(tmp_path / "1_text_document")) == both_files(str(tmp_path / "2_text_document"))
    assert [text_of(model, ids[:-1]) for ids in documents(str(tmp_path / "2_text_document"))] == texts


def test_all_kinds_of_files_give_the_same_dataset(model: Path, jsonl: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    gz = tmp_path / "texts.jsonl.gz"
    gz.write_bytes(gzip.compress(jsonl.read_bytes()))
    zst = tmp_path / "texts.jsonl.zst"
    with pyarrow.output_stream(str(zst), compression="zstd") as stream:
        stream.write(jsonl.read_bytes())
    parquet = tmp_path / "texts.parquet"
    table = pyarrow.table({"number": list(range(len(TEXTS))), "text": list(TEXTS)})
    pyarrow.parquet.write_table(table, parquet, row_group_size=2)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    names = [folder / "a.txt", folder / "b.md", folder / "inner" / "c.txt", folder / "inner" / "d.txt"]
    for name, text in zip(names, TEXTS, strict=True):
        name.write_text(text, encoding="utf-8")

    ways: dict[str, list[Path | str]] = {
        "jsonl": [jsonl],
        "gz": [gz],
        "zst": [zst],
        "parquet": [parquet],
        "folder": [folder],
        "files": list(names),
        "globs": [folder / "*.*", folder / "inner" / "*.txt"],
    }
    for way, inputs in ways.items():
        assert preprocess.main(arguments(model, inputs, tmp_path / way, "--append-eod")) == 0, way
    expected = both_files(str(tmp_path / "jsonl_text_document"))
    different = [way for way in ways if both_files(str(tmp_path / f"{way}_text_document")) != expected]
    assert different == []


def test_one_dataset_for_each_key_and_empty_documents_left_out(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"q": "One?", "a": "1"}\n\n{"q": "Nothing?", "a": ""}\n')
    settings = TokenizerSettings("SentencePieceTokenizer", str(model))
    summary = preprocess.preprocess([str(path)], str(tmp_path / "out"), settings, json_keys=["q", "a"], append_eod=True)
    assert (summary.documents, summary.empty_documents) == (3, 1)
    assert [len(documents(prefix)) for prefix in summary.prefixes] == [2, 1]


def test_hugging_face_tokenizer(jsonl: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder = tmp_path / "hf"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)

    settings = TokenizerSettings("HuggingFaceTokenizer", str(folder))
    for workers in (1, 2):
        preprocess.preprocess([str(jsonl)], str(tmp_path / f"{workers}"), settings, append_eod=True, workers=workers)
    found = documents(str(tmp_path / "1_text_document"))
    assert both_files(str(tmp_path / "1_text_document")) == both_files(str(tmp_path / "2_text_document"))
    end = tokenizer.token_to_id("<end>")
    assert all(ids[-1] == end for ids in found)
    assert tuple(tokenizer.decode(ids[:-1]) for ids in found) == TEXTS


def test_null_tokenizer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", ["5 6 7", "70000"])
    settings = TokenizerSettings("NullTokenizer", vocab_size=100_000)
    summary = preprocess.preprocess([str(path)], str(tmp_path / "out"), settings, append_eod=True)
    assert documents(summary.prefixes[0]) == [[5, 6, 7, 99_999], [70_000, 99_999]]


Breaker = Callable[[list[str], Path], None]


def replace(flag: str, value: str) -> Breaker:
    """Give a flag another value."""

    def change(command: list[str], folder: Path) -> None:
        command[command.index(flag) + 1] = value.format(folder=folder)

    return change


def give_input(name: str, content: bytes) -> Breaker:
    """Read a file with this content instead."""

    def change(command: list[str], folder: Path) -> None:
        (folder / name).write_bytes(content)
        command[command.index("--input") + 1] = str(folder / name)

    return change


def give_model(content: bytes) -> Breaker:
    """Use a tokenizer file with this content instead."""

    def change(command: list[str], folder: Path) -> None:
        (folder / "bad.model").write_bytes(content)
        command[command.index("--tokenizer-model") + 1] = str(folder / "bad.model")

    return change


def model_without_eos(command: list[str], folder: Path) -> None:
    """Use a tokenizer that cannot end documents."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "m"), vocab_size=50, eos_id=-1, minloglevel=2
    )
    replace("--tokenizer-model", "{folder}/m.model")(command, folder)


def ask_for(*more: str) -> Breaker:
    """Add flags."""
    return lambda command, folder: command.extend(more)


def null_tokenizer(text: bytes) -> Breaker:
    """Use the tokenizer of numbers, with 50 of them, on this text."""

    def change(command: list[str], folder: Path) -> None:
        give_input("numbers.txt", text)(command, folder)
        replace("--tokenizer-type", "NullTokenizer")(command, folder)
        command.extend(["--vocab-size", "50"])

    return change


REFUSALS: dict[str, tuple[Breaker, str]] = {
    "missing input": (replace("--input", "{folder}/no.jsonl"), "no.jsonl: no such file"),
    "unknown ending": (give_input("a.xyz", b"x"), "a.xyz: unknown kind of file"),
    "empty file": (give_input("a.jsonl", b""), "no text under the key 'text'"),
    "only empty documents": (give_input("a.jsonl", b'{"text": ""}\n'), "1 document(s) without tokens"),
    "not JSON": (give_input("a.jsonl", b'{"text": "x"}\n{"text": \n'), "a.jsonl:2: not a line of JSON"),
    "not JSON far down": (
        give_input("a.jsonl", b'{"text": "x"}\n' * 30_000 + b"?\n"),
        "a.jsonl:30001: not a line of JSON",
    ),
    "not an object": (give_input("a.jsonl", b'{"text": "x"}\n["x"]\n'), "a.jsonl:2: expected a JSON object"),
    "missing key": (give_input("a.jsonl", b'{"txt": "x"}\n'), "a.jsonl:1: no key 'text'; it has ['txt']"),
    "not a string": (give_input("a.jsonl", b'\n{"text": 5}\n'), "a.jsonl:2: 'text' should be a string, found a number"),
    "half a character": (give_input("a.jsonl", b'{"text": "\\ud800"}\n'), "a.jsonl:1: 'text' is not valid Unicode"),
    "not UTF-8": (give_input("a.txt", b"x\xe9"), "a.txt: not UTF-8 text (byte 1)"),
    "cut gzip": (give_input("a.jsonl.gz", gzip.compress(os.urandom(999))[:500]), "a.jsonl.gz: damaged"),
    "not Parquet": (give_input("a.parquet", b"PAR1 but no more"), "a.parquet: not a readable Parquet file"),
    "key of a text file": (
        lambda command, folder: (
            give_input("a.txt", b"x")(command, folder),
            ask_for("--json-keys", "b")(command, folder),
        ),
        "a.txt: a plain text file only has the key 'text'",
    ),
    "missing tokenizer": (replace("--tokenizer-model", "{folder}/no.model"), "no.model: no such file"),
    "unreadable tokenizer": (give_model(b"garbage"), "bad.model: not a readable SentencePieceTokenizer"),
    "no end of document": (model_without_eos, "has no end-of-document token (found -1)"),
    "words for numbers": (null_tokenizer(b"1 2 three"), "numbers.txt: 'text' cannot be tokenized"),
    "id too large": (null_tokenizer(b"1 2 99"), "token ids 1 to 99 leave the vocabulary of 50"),
    "no workers": (ask_for("--workers", "0"), "--workers 0: expected at least 1"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_in_one_line(
    name: str, workers: int, model: Path, jsonl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, expected = REFUSALS[name]
    target = tmp_path / "out"
    command = arguments(model, [jsonl], target / "prefix", "--append-eod", "--workers", str(workers))
    change(command, tmp_path)
    capfd.readouterr()
    assert preprocess.main(command) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and expected in errors[0], errors
    assert not target.exists() or list(target.iterdir()) == []


def test_a_parquet_file_without_the_column_or_with_nulls(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "b.parquet")
    assert preprocess.main(arguments(model, [tmp_path / "a.parquet"], tmp_path / "out" / "a")) == 2
    assert "a.parquet: no column 'text'; it has ['body']" in capfd.readouterr().err
    assert preprocess.main(arguments(model, [tmp_path / "b.parquet"], tmp_path / "out" / "b")) == 2
    assert "row group 0, row 1: 'text' should be a string, found null" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_output_needs_overwrite(
    model: Path, jsonl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out")) == 0
    before = both_files(str(tmp_path / "out_text_document"))
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out", "--append-eod")) == 2
    assert "out_text_document.bin exists" in capfd.readouterr().err
    assert both_files(str(tmp_path / "out_text_document")) == before
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out", "--append-eod", "--overwrite")) == 0
    assert both_files(str(tmp_path / "out_text_document")) != before


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files makes a real write fail in the middle, as a full disk does."""
    big = write_jsonl(tmp_path / "big.jsonl", [f"{number} {TEXTS[0]}" for number in range(9000)])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        status = preprocess.main(arguments(model, [big], tmp_path / "out" / "prefix"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert status == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_stopped_between_the_two_files_nothing_loads(
    model: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(tmp_path / "out_text_document")
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out")) == 0
    move = os.replace

    def stop_at_index(source: str, target: str) -> None:
        if target.endswith(".idx"):
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", stop_at_index)
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out", "--append-eod", "--overwrite")) == 130
    assert not IndexedDataset.exists(prefix)
    assert list(tmp_path.glob("*.tmp*")) == []


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "(SIGKILL) at {}, most likely for want of memory: lower --work"),
        (lambda: os.kill(os.getpid(), signal.SIGHUP), "(SIGHUP) at {}"),
        (lambda: os._exit(3), "(exit status 3) at {}"),
    ],
)
def test_a_killed_worker_is_an_error_not_a_hang(
    end: Callable[[], None],
    said: str,
    model: Path,
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line with the signal and the file."""
    monkeypatch.setattr(encoding.Encoder, "encode", lambda self, unit: end())
    capfd.readouterr()
    assert preprocess.main(arguments(model, [jsonl], tmp_path / "out" / "prefix", "--workers", "2")) == 1
    assert f"a worker was killed {said.format(jsonl)}" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_is_the_parents() -> None:
    """A terminal sends it to every process; each worker would print a traceback."""

    class Encoder:
        def encode(self, unit: object) -> str:
            os.kill(os.getpid(), signal.SIGINT)
            return "lives"

    with contextlib.ExitStack() as stack:
        unit = readers.Unit("a", readers.Form.TEXT, (), (), 0)
        assert list(in_order(stack, Encoder().encode, 2)(iter([unit]))) == ["lives"]


def test_help_answers_without_torch() -> None:
    program = (
        "import sys\nfrom megatron_btx.data.preprocess import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--append-eod" in done.stdout and done.stdout.endswith("heavy: []\n")
