"""Files as strangers bring them: read whole, or one line that names file, line and cause; never a traceback."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_btx.data import preprocess
from megatron_btx.data.readers import json_values

LINES = b'{"text": "1 2"}\n{"text": "3"}\n{"text": "4 5 6"}\n'
NUMBERS = [[1, 2], [3], [4, 5, 6]]


class Run:
    """One call of ``btx preprocess`` with the tokenizer of numbers."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capfd = folder, capfd
        self.out = self.err = ""

    def write(self, name: str, content: bytes) -> Path:
        """An input file."""
        path = self.folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def status(self, *inputs: Path | str, more: tuple[str, ...] = ()) -> int:
        """The exit status; out and err are kept."""
        command = ["--input", *map(str, inputs), "--output-prefix", str(self.folder / "out" / "o"), "--overwrite"]
        self._capfd.readouterr()
        status = preprocess.main([*command, "--tokenizer-type", "NullTokenizer", "--vocab-size", "96", *more])
        self.out, self.err = self._capfd.readouterr()
        return status

    def numbers(self, *inputs: Path | str, more: tuple[str, ...] = ()) -> list[list[int]]:
        """The documents that it makes."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        assert self.status(*inputs, more=more) == 0, self.err
        dataset = IndexedDataset(str(self.folder / "out" / "o_text_document"))
        return [dataset[number].tolist() for number in range(len(dataset))]

    def refusal(self, *inputs: Path | str, more: tuple[str, ...] = ()) -> str:
        """The one line it refuses with; nothing is written."""
        assert self.status(*inputs, more=more) == 2, self.out
        assert len(self.err.splitlines()) == 1 and self.err.startswith("error: "), self.err
        assert list(self.folder.glob("out/*")) == []
        return self.err


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Ready to be called."""
    return Run(tmp_path, capfd)


def zstd(content: bytes, *flags: str) -> bytes:
    """Compressed by the command, if it is there."""
    import zstandard

    if "--long=31" in flags:
        parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(content) + compressor.flush()  # without the size, so that the window counts
    return zstandard.ZstdCompressor().compress(content)


SKIPPABLE = b"\x53\x2a\x4d\x18\x04\x00\x00\x00abcd"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".zstd": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def parquet(rows: dict[str, object], **settings: object) -> bytes:
    """A table as a file."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(rows), sink, **settings)
    return sink.getvalue().to_pybytes()


PLAIN: dict[str, tuple[bytes, list[list[int]]]] = {
    "a.jsonl": (LINES, NUMBERS),
    "a.ndjson": (LINES, NUMBERS),
    "a.JSONL": (LINES, NUMBERS),
    "lines.json": (LINES, NUMBERS),
    "array.json": (b"[" + LINES.strip().replace(b"\n", b",") + b"]", NUMBERS),
    "spread.json": (json.dumps([json.loads(line) for line in LINES.splitlines()], indent=2).encode(), NUMBERS),
    "one.json": (json.dumps({"m": [{}, ']}\\"{'], "text": "7 8"}, indent=1).encode(), [[7, 8]]),
    "a.txt": (b"9 8 7", [[9, 8, 7]]),
    "a.parquet": (parquet({"text": ["1 2", "3", "4 5 6"]}, row_group_size=2), NUMBERS),
}


@pytest.mark.parametrize("packing", ["", *PACKERS])
@pytest.mark.parametrize("name", PLAIN)
def test_every_kind_in_every_packing(name: str, packing: str, run: Run) -> None:
    content, expected = PLAIN[name]
    path = run.write(name + packing, PACKERS[packing](content) if packing else content)
    assert run.numbers(path) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("long.jsonl.zst", zstd(LINES, "--long=31")),
        ("frames.jsonl.zst", SKIPPABLE + zstd(LINES[:16]) + SKIPPABLE + zstd(LINES[16:])),
        ("members.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(b"") + gzip.compress(LINES[20:]) + bytes(512)),
        ("streams.jsonl.bz2", bz2.compress(LINES[:20]) + bz2.compress(LINES[20:])),
        ("streams.jsonl.xz", lzma.compress(LINES[:20]) + bytes(8) + lzma.compress(LINES[20:])),
        ("says_gz.jsonl.gz", zstd(LINES)),
        ("says_plain.jsonl", bz2.compress(LINES)),
        ("is_plain.jsonl.zst", LINES),
    ],
)
def test_frames_and_names_that_lie(name: str, content: bytes, run: Run) -> None:
    assert run.numbers(run.write(name, content)) == NUMBERS


RANDOM = b"".join(b'{"text": "%d"}\n' % random.Random(n).randrange(96) for n in range(4000))


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("packing", PACKERS)
def test_a_file_that_was_cut_off_is_never_skipped(packing: str, policy: str, run: Run) -> None:
    whole = PACKERS[packing](RANDOM)
    second = PACKERS[packing](LINES)
    damaged = {
        "half": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "second": whole + second[: len(second) // 2],
        "second's head": whole + b"\x01" + second[1:],
        "five": whole[:5],
        "none": b"",
        "changed": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 0xFF]) + whole[len(whole) // 2 + 1 :],
    }
    if packing.startswith(".zst"):
        del damaged["changed"]  # without a checksum nobody can know
    for name, content in damaged.items():
        line = run.refusal(run.write(f"{name}.jsonl{packing}", content), more=("--on-bad-record", policy))
        assert f"{name}.jsonl{packing}: " in line and "fetch or write" in line, (name, line)


BAD: dict[str, tuple[bytes, str, str]] = {
    "broken": (b'{"text": "1', "not JSON", "not a line of JSON"),
    "null": (b"null", "no object", "expected a JSON object with ['text'], found null"),
    "list": (b'["1"]', "no object", "found a list; a JSON array of records is read from a file ending in .json"),
    "number": (b"3", "no object", "found a number"),
    "deep": (b'{"text": "1", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", "nested deeper"),
    "latin": (b'{"text": "\xe9"}', "not UTF-8", "not UTF-8 text (byte 10)"),
    "no key": (b'{"body": "1"}', "no key", "no key 'text'; it has ['body']"),
    "text null": (b'{"text": null}', "no string", "'text' should be a string, found null"),
    "text number": (b'{"text": NaN}', "no string", "'text' should be a string, found a number"),
    "text list": (b'{"text": ["1"]}', "no string", "'text' should be a string, found a list"),
    "surrogate": (b'{"text": "1 \\ud800"}', "not Unicode", "'text' is not valid Unicode at character 2"),
    "digits": (b'{"text": "1", "n": ' + b"9" * 5000 + b"}", "not JSON", "digits"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_stops_the_work_or_is_counted(name: str, run: Run) -> None:
    record, cause, said = BAD[name]
    path = run.write("a.jsonl", LINES[:16] + record + b"\n" + LINES[16:])
    line = run.refusal(path)
    assert "a.jsonl:2: " in line and said in line and "--on-bad-record skip" in line
    for workers in ("1", "2") if name in ("deep", "surrogate") else ("1",):
        assert run.numbers(path, more=("--on-bad-record", "skip", "--workers", workers)) == NUMBERS
        assert f"left out 1 bad record: 1 {cause}" in run.out
        assert "left out: " in run.err and "a.jsonl:2: " in run.err and said in run.err


def test_bad_records_of_an_array_are_left_out_alone(run: Run) -> None:
    records = LINES.splitlines()
    content = b'\xef\xbb\xbf[\n%s,\n{"text": },\n%s,{"text": "x" ] ,\n null,%s\n]\n' % tuple(records)
    path = run.write("a.json", content)
    assert "a.json:3: not a line of JSON" in run.refusal(path)
    assert run.numbers(path, more=("--on-bad-record", "skip")) == NUMBERS
    assert "left out 3 bad records: 2 not JSON, 1 no object" in run.out
    assert [line.split(": ")[1][-4:] for line in run.err.splitlines()] == ["on:3", "on:4", "on:5"]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_array_without_an_end_is_a_damaged_file(policy: str, run: Run) -> None:
    path = run.write("a.json", b'[{"text": "1"},\n{"text": "2"},\n{"text": "3')
    assert "a.json: line 3: the array has no end" in run.refusal(path, more=("--on-bad-record", policy))
    path = run.write("b.json", b'[{"text": "1"}]\n{"text": "2"}')
    assert "b.json: line 2: something follows the end of the array" in run.refusal(path)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"[]", []),
        (b" [ \n ]\n", []),
        (b"[1]", [(1, b"1")]),
        (b"[1,\n]", [(1, b"1"), (2, b"")]),
        (b"[[]]", [(1, b"[]")]),
    ],
)
def test_an_empty_array_holds_no_record(content: bytes, values: list[tuple[int, bytes]]) -> None:
    """But one that follows a comma and is not there is a record that cannot be read."""
    assert list(json_values(io.BufferedReader(io.BytesIO(content)), array=True)) == values


def test_only_the_first_bad_records_are_shown_and_all_are_counted(run: Run) -> None:
    path = run.write("a.jsonl", b'{"text": 1}\n' * 7 + LINES + b"[\n")
    assert run.numbers(path, more=("--on-bad-record", "skip")) == NUMBERS
    assert "left out 8 bad records: 7 no string, 1 not JSON" in run.out
    assert len(run.err.splitlines()) == 5
    only_bad = run.write("b.jsonl", b'{"body": "1"}\n' * 7)
    run.folder.joinpath("out").rename(run.folder / "before")
    assert "7 bad records: 7 no key; the first: " in run.refusal(only_bad, more=("--on-bad-record", "skip"))


def test_parquet_rows_that_are_no_text(run: Run) -> None:
    bad = pyarrow.array([b"1", b"\xff\xfe", None, b"2"], pyarrow.binary())
    for column in (bad, pyarrow.Array.from_buffers(pyarrow.string(), 4, bad.buffers()), bad.dictionary_encode()):
        path = run.write("a.parquet", parquet({"n": [0, 1, 2, 3], "text": column}))
        assert "row group 0, row 1: 'text' is not UTF-8 text (byte 0)" in run.refusal(path)
        assert run.numbers(path, more=("--on-bad-record", "skip")) == [[1], [2]]
        assert "left out 2 bad records: 1 not UTF-8, 1 no string" in run.out
        run.folder.joinpath("out").rename(run.folder / f"before {column.type}")
    numbers = run.write("n.parquet", parquet({"text": [1, 2]}))
    assert "the column 'text' should hold strings, found int64" in run.refusal(numbers)


def test_a_byte_order_mark_is_no_token_and_line_ends_are_of_the_text(run: Run) -> None:
    bom = b"\xef\xbb\xbf"
    marked = run.write("a.jsonl", bom + LINES.replace(b"\n", b"\r\n\r\n") + bom + b'{"text": "\\ufeff7"}')
    assert run.numbers(marked) == [*NUMBERS, [7]]
    assert run.numbers(run.write("a.txt", bom + b"1 2")) == [[1, 2]]
    inside = run.write("u.jsonl", '{"m": "\u2028\u2029\x85", "text": "5"}\r\n{"text": "6"}'.encode())
    assert run.numbers(inside) == [[5], [6]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_by_name(encoding: str, name: str, run: Run) -> None:
    line = run.refusal(run.write(name, LINES.decode().encode(encoding)))
    assert f"{name}: " in line and encoding[:6].upper() in line and "UTF-8" in line


def test_what_a_directory_holds_and_is_not_read_is_named(run: Run) -> None:
    run.write("d/a.jsonl", LINES)
    run.write("d/deep/er/b.json.gz", gzip.compress(b'{"text": "7"}'))
    for name in ("README.md", "LICENSE.txt", "deep/t.csv", "dataset_infos.json", ".hidden.jsonl", ".cache/h.jsonl"):
        run.write(f"d/{name}", b"x")
    (run.folder / "in" / "d" / "deep" / "again").symlink_to(run.folder / "in" / "d")
    assert run.numbers(run.folder / "in" / "d") == [*NUMBERS, [7]]
    assert "not read: 4 files (LICENSE.txt, README.md, dataset_infos.json, t.csv)" in run.out


def test_a_directory_with_nothing_to_read_is_refused(run: Run) -> None:
    for number in range(7):
        run.write(f"d/{number}.csv", b"x")
    line = run.refusal(run.folder / "in" / "d")
    assert "holds no file ending in" in line and "not read: 7 files (0.csv, 1.csv" in line and ", ...)" in line
    (run.folder / "in" / "e").mkdir()
    (run.folder / "in" / "e" / "a.jsonl").symlink_to("gone")
    assert "a.jsonl: a link to a file that is not there" in run.refusal(run.folder / "in" / "e")


def test_names_that_are_no_text_are_shown_all_the_same(run: Run) -> None:
    run.write("d/a.jsonl", LINES)
    (run.folder / "in" / "d" / os.fsdecode(b"\xe9\x1b.csv")).write_bytes(b"x")
    assert run.numbers(run.folder / "in" / "d") == NUMBERS
    assert "not read: 1 file (\\udce9\\x1b.csv)" in run.out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(30), "zip archive"),
        (parquet({"text": ["1"]}), "a Parquet file; name it .parquet"),
    ],
)
def test_other_files_under_the_name_of_text(content: bytes, said: str, run: Run) -> None:
    assert said in run.refusal(run.write("a.jsonl", content))


def _mutations(content: bytes, seed: int, count: int) -> list[bytes]:
    source = random.Random(seed)
    results = []
    for _ in range(count):
        at, length = source.randrange(len(content)), source.choice((1, 1, 2, 8, 40))
        new = source.choice((bytes(length), source.randbytes(length), b"", b'"', b"}", b"[" * 3000, b"\xef\xbb\xbf"))
        results.append(content[:at] + new + content[at + source.choice((0, length)) :])
        results.append(content[:at])
    return results


@pytest.mark.parametrize("packing", ["", *PACKERS])
@pytest.mark.parametrize("name", ["a.jsonl", "spread.json", "array.json", "a.txt", "a.parquet"])
def test_changed_bytes_never_end_in_a_traceback(name: str, packing: str, run: Run) -> None:
    content, _ = PLAIN[name]
    packed = PACKERS[packing](content) if packing else content
    for number, changed in enumerate(_mutations(packed, len(packed), 6)):
        path = run.write(f"{number}.{name}{packing}", changed)
        for policy in ("stop", "skip"):
            status = run.status(path, more=("--on-bad-record", policy))
            assert status in (0, 2), changed
            if status == 2:
                assert len(run.err.splitlines()) == 1, run.err
