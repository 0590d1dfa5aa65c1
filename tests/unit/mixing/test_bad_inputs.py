"""Unlucky and hostile inputs through the command line: exit code 2, one line that says what and where, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_btx.mixing import convert_hf
from megatron_btx.mixing.cli import main
from tests.support.mixing import mix, rewrite
from tests.unit.mixing.checkpoints import expert_words, refused
from tests.unit.mixing.folders import CONFIG, header_of, in_shards, llama_folder, llama_tensors, safetensors_bytes

SECONDS = 20
"""No bad input may make the command wait or work for longer."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that waits forever, on a pipe nobody writes to, say."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"{SECONDS} seconds have passed")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A good Hugging Face model."""
    return llama_folder(tmp_path_factory.mktemp("model") / "good")


# --- Hugging Face folders -------------------------------------------------------------------------------------

Damage = Callable[[Path], object]
ONE = "model.layers.0.mlp.up_proj.weight"
SHARED = "model.layers.1.self_attn.k_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _config(content: object) -> Damage:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / "config.json").write_bytes(text)


def _configured(**fields: object) -> Damage:
    return _config(CONFIG | fields)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = llama_tensors(1)
        change(tensors)
        (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors))

    return damage


def _number(name: str, value: float) -> Damage:
    return _tensors(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


def _header(change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = llama_tensors(1)
        header = header_of(tensors)
        changed = change(header)
        header = header if changed is None else changed
        (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors, header))

    return damage


def _entry(**fields: object) -> Damage:
    return _header(lambda header: header[ONE].update(fields))


def _cut(keep: Callable[[int], int]) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: keep(len(content))])

    return damage


def _length(length: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])

    return damage


def _sharded(change: Callable[[dict, dict], object] = lambda shards, weight_map: None) -> Damage:
    """Two shards and their index; ``change`` gets both before they are written."""

    def damage(folder: Path) -> None:
        items = list(llama_tensors(1).items())
        shards = {SHARDS[0]: dict(items[:9]), SHARDS[1]: dict(items[9:])}
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        change(shards, weight_map)
        in_shards(folder, shards, weight_map)

    return damage


def _index(content: object) -> Damage:
    def damage(folder: Path) -> None:
        _sharded()(folder)
        (folder / INDEX).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return damage


def _instead(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def _dangling(file: Path) -> None:
    file.symlink_to("../../blobs/gone")


def _pickled_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DEEP = b"[" * 200_000
FOLDERS: dict[str, tuple[Damage, list[str]]] = {
    "no config.json": (_without("config.json"), [WEIGHTS, "no config.json", "incomplete"]),
    "config.json not JSON": (_config(b'{"hidden_size": '), ["config.json", "is not JSON"]),
    "config.json binary": (_config(b"\xff\xfe\x00"), ["config.json", "is not JSON"]),
    "config.json a list": (_config([1]), ["config.json", "list", "expected an object"]),
    "config.json empty": (_config(b""), ["config.json", "is not JSON"]),
    "config.json without bottom": (_config(DEEP), ["config.json", "is not JSON"]),
    "config.json a folder": (_instead("config.json", Path.mkdir), ["config.json", "is no file"]),
    "config.json a pipe": (_instead("config.json", os.mkfifo), ["config.json", "is no file"]),
    "config.json a dangling link": (_instead("config.json", _dangling), ["config.json", "link to none"]),
    "unknown architecture": (
        _configured(architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox"),
        ["config.json", "GPTNeoXForCausalLM", "LlamaForCausalLM"],
    ),
    "architecture of no words": (_configured(architectures=[["x"]], model_type=None), ["config.json", "architectures"]),
    "a billion layers": (_configured(num_hidden_layers=10**9), ["config.json", "1000000000 layers"]),
    "a size of words": (_configured(hidden_size="16"), ["config.json", "hidden_size", "'16'"]),
    "a size of none": (_configured(intermediate_size=0), ["config.json", "intermediate_size", "0"]),
    "a size that is none of the tensors'": (
        _configured(intermediate_size=48),
        ["[24, 16]", "[48, 16]", "mlp.gate_proj"],
    ),
    "missing tensor": (_tensors(lambda t: t.pop(ONE)), [ONE, "is missing"]),
    "extra tensor": (_tensors(lambda t: t.update({"model.extra.weight": t[ONE]})), ["model.extra.weight", "supported"]),
    "extra layer": (
        _tensors(lambda t: t.update({"model.layers.2.input_layernorm.weight": t["model.norm.weight"]})),
        ["model.layers.2.input_layernorm.weight"],
    ),
    "tensor of another shape": (_tensors(lambda t: t.update({ONE: t[ONE].T})), [ONE, "[16, 24]", "[24, 16]"]),
    "tensor of one axis more": (_tensors(lambda t: t.update({ONE: t[ONE][None]})), [ONE, "[1, 24, 16]"]),
    "tensor of a number": (_tensors(lambda t: t.update({ONE: t[ONE][0, 0]})), [ONE, "[]"]),
    "tensor of int8": (_tensors(lambda t: t.update({ONE: t[ONE].to(torch.int8)})), [ONE, "I8", "unquantised"]),
    "tensor of fp8": (_tensors(lambda t: t.update({ONE: t[ONE].to(torch.float8_e4m3fn)})), [ONE, "F8_E4M3"]),
    "tensor of another float": (
        _tensors(lambda t: t.update({ONE: t[ONE].bfloat16()})),
        [ONE, "bfloat16", "--take dtype="],
    ),
    "NaN in a moved tensor": (_number(ONE, float("nan")), ["odd (", ONE, "NaN", "row 0"]),
    "infinity in a moved tensor": (_number(ONE, float("inf")), ["odd (", ONE, "infinite", "row 0"]),
    "infinity in an averaged tensor": (_number(SHARED, float("-inf")), ["odd (", SHARED, "infinite", "row 0"]),
    "NaN in a vocabulary row": (_number("lm_head.weight", float("nan")), ["odd (", "lm_head.weight", "row 0"]),
    "empty file": (_cut(lambda size: 0), [WEIGHTS, "0 bytes", "truncated"]),
    "cut in the length": (_cut(lambda size: 5), [WEIGHTS, "5 bytes", "truncated"]),
    "cut in the header": (_cut(lambda size: 400), [WEIGHTS, "400 bytes", "header"]),
    "cut after the header": (_cut(lambda size: size - 5000), [WEIGHTS, "truncated"]),
    "cut at the last byte": (_cut(lambda size: size - 1), [WEIGHTS, "truncated"]),
    "header beyond the file": (_length(2**40), [WEIGHTS, str(2**40)]),
    "header of all lengths": (_length(2**64 - 1), [WEIGHTS, str(2**64 - 1)]),
    "header of none": (_length(0), [WEIGHTS, "header"]),
    "header not JSON": (_header(lambda header: b"x" * 500), [WEIGHTS, "header cannot be read"]),
    "header a list": (_header(lambda header: [header]), [WEIGHTS, "header cannot be read"]),
    "header without bottom": (_header(lambda header: DEEP), [WEIGHTS, "header cannot be read"]),
    "offsets that overlap": (_entry(data_offsets=[0, 1536]), [WEIGHTS, "damaged"]),
    "a hole between tensors": (_header(lambda header: header.pop(ONE) and None), [WEIGHTS, "does not fit its bytes"]),
    "offsets out of range": (_entry(data_offsets=[10**6, 10**6 + 1536]), [WEIGHTS, "damaged"]),
    "offsets backwards": (_entry(data_offsets=[3000, 1464]), [WEIGHTS, "damaged"]),
    "one offset": (_entry(data_offsets=[0]), [WEIGHTS, "damaged"]),
    "offsets of words": (_entry(data_offsets=["0", "1536"]), [WEIGHTS, "header cannot be read"]),
    "offsets that are no list": (_entry(data_offsets=7), [WEIGHTS, "header cannot be read"]),
    "negative shape": (_entry(shape=[-24, -16]), [WEIGHTS, "header cannot be read", "[-24, -16]"]),
    "shape of fractions": (_entry(shape=[24.0, 16.0]), [WEIGHTS, "header cannot be read"]),
    "shape that overflows": (_entry(shape=[2**62, 2**62]), [WEIGHTS, ONE, "does not fit its bytes"]),
    "dtype of no words": (_entry(dtype=["F32"]), [WEIGHTS, ONE, "expected one of"]),
    "no dtype": (_header(lambda header: header[ONE].pop("dtype") and None), [WEIGHTS, "KeyError('dtype')"]),
    "a tensor in two shards": (
        _sharded(lambda shards, weight_map: shards[SHARDS[1]].update({ONE: shards[SHARDS[0]][ONE] + 1})),
        [SHARDS[1], ONE, f"is in {SHARDS[0]} as well"],
    ),
    "a shard is missing": (
        lambda folder: (_sharded()(folder), (folder / SHARDS[1]).unlink()),
        [SHARDS[1], "does not exist", INDEX],
    ),
    "a shard is a pipe": (
        lambda folder: (_sharded()(folder), (folder / SHARDS[1]).unlink(), os.mkfifo(folder / SHARDS[1])),
        [SHARDS[1], INDEX],
    ),
    "a shard outside": (
        _sharded(lambda shards, weight_map: weight_map.update({ONE: "../x.safetensors"})),
        [INDEX, "'../x.safetensors'", "refused"],
    ),
    "a shard at an absolute path": (
        _sharded(lambda shards, weight_map: weight_map.update({ONE: "/etc/x.safetensors"})),
        [INDEX, "'/etc/x.safetensors'", "refused"],
    ),
    "a shard of another kind": (
        _sharded(lambda shards, weight_map: weight_map.update({ONE: "config.json"})),
        [INDEX, "'config.json'", "refused"],
    ),
    "a shard lacks its tensor": (
        _sharded(lambda shards, weight_map: shards[SHARDS[0]].pop(ONE)),
        [INDEX, ONE, SHARDS[0], "does not hold it"],
    ),
    "a tensor is in the other shard": (
        _sharded(lambda shards, weight_map: weight_map.update({ONE: SHARDS[1]})),
        [INDEX, ONE, SHARDS[0], SHARDS[1]],
    ),
    "a tensor that the index does not name": (
        _sharded(lambda shards, weight_map: weight_map.pop(ONE)),
        [INDEX, ONE, "does not name"],
    ),
    "index without weight_map": (_index({"metadata": {}}), [INDEX, "no weight_map"]),
    "weight_map a list": (_index({"weight_map": [ONE]}), [INDEX, "no weight_map"]),
    "weight_map of numbers": (_index({"weight_map": {ONE: 1}}), [INDEX, "no weight_map"]),
    "weight_map of nothing": (_index({"weight_map": {}}), ["model.embed_tokens.weight is missing"]),
    "index not JSON": (_index(b"{"), [INDEX, "is not JSON"]),
    "index a pipe": (_instead(INDEX, os.mkfifo), [INDEX, "is no file"]),
    "index a dangling link": (_instead(INDEX, _dangling), [INDEX, "link to none"]),
    "weights a folder": (_instead(WEIGHTS, Path.mkdir), [WEIGHTS, "is no file"]),
    "weights a pipe": (_instead(WEIGHTS, os.mkfifo), [WEIGHTS, "is no file"]),
    "weights a dangling link": (_instead(WEIGHTS, _dangling), [WEIGHTS, "link to none"]),
    "weights gone": (_without(WEIGHTS), ["neither model.safetensors nor model.safetensors.index.json"]),
    "pickled weights alone": (_pickled_only, ["pytorch_model.bin", "can run code", "save_pretrained"]),
    "empty folder": (_emptied, ["latest_checkpointed_iteration.txt"]),
    "a manifest that is a pipe": (_instead("manifest.json", os.mkfifo), ["manifest.json", "is no file"]),
    "a manifest that is not JSON": (_instead("manifest.json", lambda file: file.write_text("{")), ["manifest.json"]),
}


@pytest.mark.parametrize("case", list(FOLDERS))
def test_hugging_face_folders(case, model, tmp_path, capsys):
    """As an expert of a mix, in either place; the folder is named, and stays as it is."""
    damage, named = FOLDERS[case]
    odd = llama_folder(tmp_path / "sources" / "odd", 1)
    damage(odd)
    before = sorted(str(file) for file in odd.rglob("*"))
    for experts in ({"good": model, "odd": odd}, {"odd": odd, "good": model}):
        message = refused([*expert_words(experts), "--output-format", "hf"], tmp_path / "out", capsys)
        for text in [*named, str(odd) if case != "tensor of another float" else "in odd"]:
            assert text in message
    assert sorted(str(file) for file in odd.rglob("*")) == before


def test_the_same_through_the_other_command(tmp_path, capsys):
    """What convert_hf.py refuses is refused in the same way."""
    odd = llama_folder(tmp_path / "odd", 1)
    _number(ONE, float("nan"))(odd)
    for folder, named in ((odd, ["NaN", ONE]), (tmp_path / "nowhere", ["no such folder"]), (odd / "config.json", [])):
        assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(text in line for text in [*named, str(folder)])
    assert sorted(os.listdir(tmp_path)) == ["odd"]


def test_control_characters_in_strangers_names_are_shown_harmlessly(model, tmp_path, capsys):
    """A terminal would obey them."""
    odd = llama_folder(tmp_path / "sources" / "odd", 1)
    _tensors(lambda t: t.update({"x\x1b]0;owned\x07\n\u2028y": t[ONE]}))(odd)
    message = refused(expert_words({"good": model, "odd": odd}), tmp_path / "out", capsys)
    assert message.isprintable() and "\\x1b]0;owned\\x07" in message


def test_a_long_story_is_cut(model, tmp_path, capsys):
    odd = llama_folder(tmp_path / "sources" / "odd", 1)
    _entry(shape=[1] * 100_000)(odd)
    message = refused(expert_words({"good": model, "odd": odd}), tmp_path / "out", capsys)
    assert len(message) < 5000 and " [...] " in message and message.endswith("damaged")


# --- the command line -----------------------------------------------------------------------------------------

CODE = "__import__('os').system('touch {out}')"
WORDS: dict[str, tuple[str, list[str]]] = {
    "a name with a blank": ("--expert 'a b={b}'", ["'a b'", "without slashes"]),
    "a name with a slash": ("--expert ../x={b}", ["'../x'", "without slashes"]),
    "a name with a control character": ("--expert 'x\x1b[2J={b}'", ["'x\\x1b[2J'"]),
    "a name of no letters": ("--expert =", ["--expert =", "NAME=PATH"]),
    "a name with bytes that are no text": ("--expert x\udcff={b}", ["\\udcff"]),
    "a path that is a file": ("--expert c={b}/config.json", ["config.json", "no such folder"]),
    "a weight of nobody": ("--weight z=1", ["--weight", "'z'", "a, b"]),
    "a weight below 0": ("--weight a=-1", ["--weight a=-1", "at least 0"]),
    "a weight of NaN": ("--weight a=nan", ["--weight a=nan"]),
    "a weight without end": ("--weight a=1e999", ["--weight a=inf"]),
    "a weight of words": ("--weight a=much", ["--weight a=much", "expected a number"]),
    "a weight without a name": ("--weight 2", ["--weight 2", "NAME=W"]),
    "two weights of one": ("--weight a=1 --weight a=2", ["--weight a=", "twice"]),
    "no weight at all": ("--weight a=0 --weight b=0", ["all weights are 0"]),
    "weights that overflow": ("--weight a=1e308 --weight b=1e308", ["--weight", "infinite"]),
    "weights that average nothing": ("--method upcycle --copies 2 --weight a=1", ["upcycle takes 1"]),
    "taking what nobody knows": ("--take colour=a", ["--take colour", "rotary_base"]),
    "taking what shapes tensors": ("--take hidden_size=a", ["--take hidden_size", "shapes tensors"]),
    "taking from nobody": ("--take rotary_base=z", ["--take", "'z'", "a, b"]),
    "taking without a name": ("--take rotary_base", ["--take rotary_base", "FIELD=NAME"]),
    "taking twice": ("--take rope_theta=a --take rotary_base=b", ["rotary_base", "twice"]),
    "chunks that do not divide": ("--method split --chunks 5", ["24", "5 equal parts", "divisor"]),
    "one chunk": ("--method split --chunks 1", ["--chunks 1", "2 to"]),
    "no chunk": ("--method split --chunks 0", ["--chunks 0", "2 to"]),
    "chunks below none": ("--method split --chunks -3", ["--chunks -3", "2 to"]),
    "chunks without end": ("--method split --chunks 1000000000", ["--chunks 1000000000", "2 to"]),
    "chunks of no split": ("--chunks 2", ["--method btx", "--chunks does not apply"]),
    "split without chunks": ("--method split", ["--chunks is missing"]),
    "copies of no upcycling": ("--copies 2", ["--method btx", "does not apply"]),
    "copies and chunks": ("--copies 2 --chunks 2", ["--method btx", "does not apply, it belongs to"]),
    "upcycling of two": ("--method upcycle --copies 4", ["--expert: 2 given", "upcycle takes 1"]),
    "frequency of the wrong length": ("--moe-layer-freq [1,0,1]", ["[1,0,1]", "expected 2 numbers"]),
    "frequency of no mixture": ("--moe-layer-freq [0,0]", ["[0,0]", "at least one 1"]),
    "frequency of twos": ("--moe-layer-freq [2,1]", ["[2,1]", "0 or 1"]),
    "frequency of words": ("--moe-layer-freq every", ["every", "expected a number"]),
    "frequency 0": ("--moe-layer-freq 0", ["--moe-layer-freq 0", "1 to 2"]),
    "frequency of code": (f'--moe-layer-freq "{CODE}"', ["__import__", "expected a number"]),
    "frequency of a billion": ("--moe-layer-freq [1]*10**9", ["[1]*10**9", "expected a number"]),
    "routers of no spread": ("--router-std 0", ["--router-std 0", "above 0"]),
    "routers of a negative spread": ("--router-std -1", ["--router-std -1", "above 0"]),
    "routers of no number": ("--router-std nan", ["--router-std nan", "above 0"]),
    "routers without end": ("--router-std inf", ["--router-std inf", "above 0"]),
    "a seed too large": ("--router-seed 99999999999999999999", ["--router-seed 9999", "expected 0 to"]),
    "no workers": ("--workers 0", ["--workers 0", "1 to 256"]),
    "workers below none": ("--workers -1", ["--workers -1"]),
    "workers without end": ("--workers 100000", ["--workers 100000"]),
    "explaining what is not there": ("--explain no.such.tensor", ["--explain no.such.tensor", "--dry-run"]),
    "explaining a neighbour": ("--explain decoder.layers.0.mlp.router.weight", ["there is decoder.layers.mlp.router"]),
}


@pytest.mark.parametrize("case", list(WORDS))
def test_command_lines(case, model, tmp_path, capsys):
    import shlex

    words, named = WORDS[case]
    out = tmp_path / "out"
    given = [word.format(b=model, out=out) for word in shlex.split(words)]
    experts = expert_words({"a": model, "b": model})
    message = refused([*experts, *given], out, capsys)
    for text in named:
        assert text in message


def test_paths_and_places_of_the_output(model, tmp_path, capsys):
    """In a source, a source itself, a file, no name at all; through links and other spellings."""
    source = llama_folder(tmp_path / "sources" / "mine", 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    words = expert_words({"a": model, "b": source})
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    for output, named in (
        (source, "holds the expert b"),
        (source / "mixed", "lies in the expert b"),
        (source / "a" / ".." / "mixed", "lies in the expert b"),
        (tmp_path / "link" / "mixed", "lies in the expert b"),
        (tmp_path / "link", "holds the expert b"),
        (tmp_path / "file", "exists already"),
        (tmp_path / "file" / "out", "File exists"),
        (tmp_path / "new" / "newer" / "..", "expected a name"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        for more in ([], ["--overwrite"]):
            assert main([*words, *more, "--output", str(output)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert named in line or (more and "is not a checkpoint" in line), line
    assert main([*words, "--output", ""]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


# --- routers from a file --------------------------------------------------------------------------------------


class _Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


def _saved(rows: object) -> Callable[[Path], object]:
    return lambda file: np.save(file, rows, allow_pickle=True)


def _huge(file: Path) -> None:
    """A header that asks for eight TiB, and no numbers."""
    header = str({"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)}).ljust(117).encode() + b"\n"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


ROUTERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda file: None, ["there is none"]),
    "a folder": (Path.mkdir, ["there is none"]),
    "of another shape": (_saved(np.zeros((2, 5, 16), np.float32)), ["[2, 5, 16]", "[2, 2, 16]"]),
    "of one axis": (_saved(np.zeros(16, np.float32)), ["[16]"]),
    "NaN": (_saved(np.full((2, 16), np.nan, np.float32)), ["NaN"]),
    "beyond fp32": (_saved(np.full((2, 16), 1e300)), ["infinite"]),
    "of objects": (_saved(np.array([_Runs(Path("x"))], dtype=object)), ["not an .npy file"]),
    "of words": (_saved(np.array(["x"])), ["not an .npy file"]),
    "of complex numbers": (_saved(np.zeros((2, 16), np.complex64)), ["not an .npy file", "complex64"]),
    "empty": (lambda file: file.write_bytes(b""), ["not an .npy file"]),
    "something else": (lambda file: file.write_text("normal"), ["not an .npy file"]),
    "cut": (lambda file: (_saved(np.zeros((2, 16)))(file), os.truncate(file, 200)), ["not an .npy file"]),
    "of a huge shape": (_huge, ["not an .npy file"]),
    "a cut archive": (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(40)), ["not an .npy file"]),
    "several arrays": (lambda file: np.savez(file.open("wb"), np.zeros((2, 16))), ["not an .npy file"]),
}


@pytest.mark.parametrize("case", list(ROUTERS))
def test_routers_from_a_file(case, model, tmp_path, capsys):
    make, named = ROUTERS[case]
    file = tmp_path / "sources" / "rows.npy"
    file.parent.mkdir()
    make(file)
    words = expert_words({"a": model, "b": model})
    message = refused([*words, "--router-init", str(file)], tmp_path / "out", capsys)
    for text in ["--router-init", str(file), *named]:
        assert text in message


def test_routers_from_a_pickle_run_nothing(model, tmp_path, capsys):
    import pickle

    (tmp_path / "sources").mkdir()
    mark, file = tmp_path / "sources" / "was here", tmp_path / "sources" / "rows.npy"
    file.write_bytes(pickle.dumps(_Runs(mark)))
    words = expert_words({"a": model, "b": model})
    refused([*words, "--router-init", str(file)], tmp_path / "out", capsys)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists(), "else this payload would prove nothing"


# --- tokenizers -----------------------------------------------------------------------------------------------


def _tokenizer(vocab: object) -> str:
    return json.dumps({"model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""}, "added_tokens": []})


TOKENIZERS: dict[str, tuple[str, str, str, list[str]]] = {
    "one number, two tokens": ("union", '{"x": 0, "y": 1}', '{"x": 0, "z": 1}', ["token 1", "'y'", "'z'"]),
    "unreadable": ("union", '{"x": 0}', "{", ["b: its vocabulary cannot be read"]),
    "without bottom": ("union", '{"x": 0}', "[" * 200_000, ["b: its vocabulary cannot be read"]),
    "of lists": ("union", '{"x": 0}', '{"x": [0]}', ["b: its vocabulary cannot be read"]),
    "differ": ("same", '{"x": 0}', '{"y": 0}', ["tokenizers differ", "a", "b", "--allow-other-tokenizer"]),
}


@pytest.mark.parametrize("case", list(TOKENIZERS))
def test_tokenizers(case, tmp_path, capsys):
    kind, left, right, named = TOKENIZERS[case]
    experts = {}
    for name, content in (("a", left), ("b", right)):
        experts[name] = llama_folder(tmp_path / "sources" / name)
        (experts[name] / "vocab.json").write_text(content)
    message = refused([*expert_words(experts), "--vocab", kind], tmp_path / "out", capsys)
    for text in named:
        assert text in message


def test_a_union_without_vocabularies(model, tmp_path, capsys):
    message = refused([*expert_words({"a": model, "b": model}), "--vocab", "union"], tmp_path / "out", capsys)
    assert "cannot be read" in message and "--allow-other-tokenizer" in message


def test_a_tokenizer_json_of_nonsense(tmp_path, capsys):
    """Whatever the JSON holds, its vocabulary is one that can be read or not; the library panics at some."""
    words = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": ""}
    experts = {name: llama_folder(tmp_path / "sources" / name) for name in "ab"}
    (experts["a"] / "tokenizer.json").write_text(_tokenizer({"x": 0}))
    for nonsense in (
        [],
        {},
        {"model": []},
        {"model": {"vocab": 3}},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": [[]]}},
        {"model": words | {"vocab": {"\ud800": 0}}},
        {"model": words, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": words, "normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    ):
        (experts["b"] / "tokenizer.json").write_text(json.dumps(nonsense))
        message = refused([*expert_words(experts), "--vocab", "union"], tmp_path / "out", capsys)
        assert "b: its vocabulary cannot be read" in message
    for added in (5, [3], [{}], [{"content": [], "id": 1}], [{"content": "z", "id": None}]):
        content = json.dumps({"model": words, "added_tokens": added})
        (experts["b"] / "tokenizer.json").write_text(content)
        assert "cannot be read" in refused([*expert_words(experts), "--vocab", "union"], tmp_path / "out", capsys)


# --- other formats, other kinds of model ----------------------------------------------------------------------


def test_megatrons_old_format(dense, tmp_path, capsys):
    """A root with a tracker, an iteration's folder, and a root without a tracker: by name, with the way out."""
    root = tmp_path / "sources" / "old"
    (root / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    (root / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"never opened")
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    for path in (root, root / "iter_0000100"):
        message = refused(expert_words({"a": dense, "b": path}), tmp_path / "out", capsys)
        for text in ("iter_0000100", "mp_rank_00", "old format 'torch'", "tools/checkpoint", "--ckpt-convert-format"):
            assert text in message


@pytest.mark.parametrize("with_format_file", [False, True])
def test_megatrons_fsdp_format(with_format_file, dense, tmp_path, capsys):
    """Told by its index without a format file, or by a format file that names it."""
    root = tmp_path / "sources" / "fsdp"
    shutil.copytree(dense / "iter_0000010", root / "iter_0000010")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    (root / "iter_0000010" / "metadata.json").unlink()
    if with_format_file:
        (root / "iter_0000010" / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    message = refused(expert_words({"a": dense, "b": root}), tmp_path / "out", capsys)
    for text in ("iter_0000010", "fsdp_dtensor", "--ckpt-format torch_dist"):
        assert text in message


ARGUMENTS: dict[str, tuple[dict, list[str]]] = {
    "groups of words": ({"num_query_groups": "2"}, ["num_query_groups", "'2'"]),
    "groups that do not divide": ({"num_query_groups": 3}, ["3 query groups"]),
    "a head size below 0": ({"kv_channels": -8}, ["kv_channels", "-8"]),
    "a vocabulary of a fraction": ({"vocab_size": 96.5}, ["vocab_size", "96.5"]),
    "layers without end": ({"num_layers": 10**9}, ["1000000000 layers"]),
    "a tokenizer that is no path": ({"tokenizer_model": 7}, ["tokenizer_model", "7"]),
    "a frequency of words": ({"moe_layer_freq": "[1]*4"}, ["moe_layer_freq"]),
    "a frequency of another length": ({"num_experts": 2, "moe_layer_freq": [1]}, ["moe_layer_freq", "[1]"]),
}


@pytest.mark.parametrize("case", list(ARGUMENTS))
def test_stored_arguments_of_nonsense(case, dense, tmp_path, capsys):
    arguments, named = ARGUMENTS[case]
    odd = rewrite(dense, tmp_path / "sources" / "odd", arguments=arguments)
    message = refused(expert_words({"a": dense, "odd": odd}), tmp_path / "out", capsys)
    for text in [*named, "odd (", str(odd)]:
        assert text in message


def test_mixtures_and_strange_pairs(dense, model, tmp_path, capsys):
    """A Hugging Face mixture is no expert either; nor do a pico Megatron model and a Llama make one mixture."""
    (tmp_path / "sources").mkdir()
    mixture = mix({"a": model, "b": model}, tmp_path / "sources" / "mixture", "--output-format", "hf")
    for more in ([], ["--method", "split", "--chunks", "2"]):
        message = refused([*expert_words({"a": model, "b": mixture}), *more], tmp_path / "out", capsys)
        assert "b (" in message and "mixture of 2 experts" in message and "dense" in message
    message = refused(expert_words({"a": model, "b": dense}), tmp_path / "out", capsys)
    assert "experts differ in their configuration" in message and "hidden_size: " in message
    message = refused(expert_words({"a": dense, "b": model}), tmp_path / "out", capsys)
    assert "experts differ in their configuration" in message


def test_verifying_what_cannot_be(model, tmp_path, capsys):
    for folder, said in ((model, "has no manifest.json"), (tmp_path / "nowhere", "there is no such folder")):
        assert main(["--verify", "--output", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder}: {said}" in line
    assert main(["--verify"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0 expert given" in line or "--output is missing" in line
