"""Rows and the tokens they belong to: what is averaged with what, whose tokenizer a result has, rows that are added."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.mixing import compute, convert_hf, operations
from megatron_btx.mixing import verify as rows_proof
from megatron_btx.mixing.cli import main
from megatron_btx.mixing.loader import Source, open_source
from megatron_btx.tokenizers.vocabulary import known_vocabulary
from tests.support.hugging_face import config_of, loaded, tensors
from tests.support.mixing import mix, rewrite
from tests.unit.mixing.checkpoints import expert_words, refused
from tests.unit.mixing.folders import CONFIG, HIDDEN, llama_tensors, safetensors_bytes

KEYS = ("model.embed_tokens.weight", "lm_head.weight")
FORMATS = ("hf", "megatron")


def words(count: int) -> dict[str, int]:
    """A vocabulary of whole words."""
    return {f"word{number}": number for number in range(count)}


def word_json(count: int, *added: str) -> dict[str, Any]:
    """The same as a tokenizer.json, and tokens added to it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    entries = [{"id": count + number, "content": token, **flags} for number, token in enumerate(added)]
    return {"model": {"type": "WordLevel", "vocab": words(count), "unk_token": ""}, "added_tokens": entries}


def model(folder: Path, seed: int, rows: int, files: Mapping[str, Any], **config: object) -> Path:
    """A pico Llama with so many rows, and the tokenizer files given."""
    folder.mkdir(parents=True)
    held = llama_tensors(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    for key in KEYS:
        held[key] = torch.randn(rows, HIDDEN, generator=generator)
    if config.get("tie_word_embeddings"):
        del held["lm_head.weight"]
    (folder / "model.safetensors").write_bytes(safetensors_bytes(held))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": rows} | config))
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def pair(tmp_path: Path, a: tuple[int, Mapping[str, Any]], b: tuple[int, Mapping[str, Any]]) -> dict[str, Path]:
    """Two models: of each the rows and the files."""
    made = {}
    for seed, (name, (rows, files)) in enumerate({"a": a, "b": b}.items()):
        made[name] = model(tmp_path / "sources" / name, seed, rows, files)
    return made


def mixed(experts: Mapping[str, Path], out: Path, format_: str, *more: str) -> dict[str, torch.Tensor]:
    """Mix, verified; the result's tensors as a Hugging Face folder has them."""
    mix(dict(experts), out, "--verify", "--allow-other-ids", f"--output-format={format_}", *more)
    if format_ == "hf":
        return tensors(out)
    assert (
        convert_hf.main(["export", "--checkpoint", str(out), "--output", f"{out}-hf", "--verify", "--allow-other-ids"])
        == 0
    )
    return tensors(Path(f"{out}-hf"))


def mean(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([row.double() for row in rows]).mean(0).float()


# --- what is refused ------------------------------------------------------------------------------------------

DECODER = {"added_tokens_decoder": {"30": {"content": "<|im_start|>"}}}
CONTRADICTIONS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "added_tokens.json": ({"added_tokens.json": {"<|im_start|>": 30}}, {"added_tokens.json": {"[PAD]": 30}}),
    "a decoder": ({"tokenizer_config.json": DECODER}, {"added_tokens.json": {"[PAD]": 30}}),
    "a named token": ({"tokenizer_config.json": {"eos_token": "<|im_start|>"}}, {"added_tokens.json": {"[PAD]": 30}}),
    "the map": (
        {"added_tokens.json": {"<|im_start|>": 30}},
        {"special_tokens_map.json": {"pad_token": {"content": "[PAD]"}}},
    ),
}


@pytest.mark.parametrize("vocab", ["same", "union"])
@pytest.mark.parametrize("case", list(CONTRADICTIONS))
def test_a_number_that_is_another_added_token(case, vocab, tmp_path, capsys):
    """One number, two tokens: both are named, whatever file they stand in."""
    base = {"vocab.json": words(30)}
    left, right = CONTRADICTIONS[case]
    experts = pair(tmp_path, (31, base | left), (31, base | right))
    message = refused([*expert_words(experts), "--vocab", vocab], tmp_path / "out", capsys)
    assert "token 30 is '<|im_start|>' in a and '[PAD]' in b" in message and "1 number differs" in message
    assert "--allow-other-tokenizer" in message


def test_a_token_with_two_numbers(tmp_path, capsys):
    """No tokenizer can have it both ways, though no number has two tokens."""
    experts = pair(
        tmp_path, (32, {"vocab.json": words(30) | {"<x>": 30}}), (32, {"vocab.json": words(30) | {"<x>": 31}})
    )
    message = refused([*expert_words(experts), "--vocab", "union"], tmp_path / "out", capsys)
    assert "'<x>' is token 30 in a and token 31 in b" in message


def test_more_tokens_ask_for_a_union(tmp_path, capsys):
    """Equal rows, one token more: the token is named, and the flag."""
    experts = pair(tmp_path, (32, {"vocab.json": words(30)}), (32, {"vocab.json": words(31)}))
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert "token 30 is nobody's in a and 'word30' in b; 1 number differs" in message
    assert "where one extends the other, --vocab union" in message


def test_as_many_tokens_with_other_numbers(tmp_path, capsys):
    """Sizes are equal and the vocabularies are not: each has a token that the other lacks."""
    experts = pair(tmp_path, (32, {"vocab.json": words(30) | {"x": 30}}), (32, {"vocab.json": words(30) | {"y": 31}}))
    assert "token 30 is 'x' in a and nobody's in b" in refused(expert_words(experts), tmp_path / "out", capsys)
    message = refused([*expert_words(experts), "--vocab", "union"], tmp_path / "out", capsys)
    assert "no expert's tokenizer has every token: that of a has the most and lacks 1, the first 'y'" in message
    assert "(token 31 of b)" in message and "--allow-other-tokenizer" in message


def test_one_tokenizer_is_missing(tmp_path, capsys):
    experts = pair(tmp_path, (30, {"vocab.json": words(30)}), (30, {}))
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert "b: no tokenizer comes with it" in message and "--allow-other-tokenizer" in message


# --- what is averaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_padding_enters_no_average(order, format_, tmp_path):
    """A row that is a token of one alone is that one's, bit for bit, though the other has numbers there too."""
    base = {"vocab.json": words(29)}
    experts = pair(tmp_path, (32, base | {"added_tokens.json": {"<|im_start|>": 29, "<|im_end|>": 30}}), (32, base))
    found = mixed({name: experts[name] for name in order}, tmp_path / "out", format_, "--vocab=union")
    held = {name: tensors(folder) for name, folder in experts.items()}
    for key in KEYS:
        a, b = held["a"][key], held["b"][key]
        assert torch.equal(found[key][:29], mean([a[:29], b[:29]]))
        assert torch.equal(found[key][29:31], a[29:31])
        assert torch.equal(found[key][31:], mean([a[31:], b[31:]])), "nobody's: of all that have it, as ever"


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_union_has_the_tokenizer_with_every_token(order, format_, tmp_path):
    """31 rows and 31 tokens, wherever the smaller model stands; its padding rows change nothing."""
    experts = pair(tmp_path, (40, {"vocab.json": words(30)}), (31, {"vocab.json": words(31)}))
    out = tmp_path / "out"
    found = mixed({name: experts[name] for name in order}, out, format_, "--vocab=union")
    folder = out if format_ == "hf" else out / "huggingface"
    assert known_vocabulary({"hf_folder": folder}).below(40) == dict(enumerate(words(31)))
    b = tensors(experts["b"])
    for key in KEYS:
        assert found[key].shape[0] == 40 and torch.equal(found[key][30], b[key][30])
    again = open_source("mix", out)
    assert again.token_rows("embedding.weight") == ((0, 31),) and again.pieces["embedding.weight"].shape[0] == 40
    manifest = json.loads((out / "manifest.json").read_text())["vocabulary"]
    assert manifest == {"tokenizer_of": "b", "known": True, "token_rows": [[0, 31]], "rows": 40, "new_rows": 0}


def test_holes_are_padding(tmp_path):
    """Rows between tokens that are nobody's in one model and a token in the other."""
    holes = {token: number for token, number in words(30).items() if number not in (7, 8, 20)}
    experts = pair(tmp_path, (30, {"vocab.json": holes}), (30, {"vocab.json": words(30)}))
    found = mixed(experts, tmp_path / "out", "hf", "--vocab=union", "--weight=a=3")
    a, b = (tensors(experts[name])["lm_head.weight"] for name in "ab")
    theirs = [7, 8, 20]
    both = [number for number in range(30) if number not in theirs]
    assert torch.equal(found["lm_head.weight"][theirs], b[theirs])
    expected = (0.75 * a.double() + 0.25 * b.double()).float()
    assert torch.equal(found["lm_head.weight"][both], expected[both])


def test_a_weight_of_zero_leaves_ones_own_tokens(tmp_path):
    """A row that only the model without weight knows is still its row, never zero or NaN."""
    experts = pair(tmp_path, (31, {"vocab.json": words(31)}), (30, {"vocab.json": words(30)}))
    found = mixed(experts, tmp_path / "out", "hf", "--vocab=union", "--weight=a=0")
    a, b = (tensors(experts[name])["lm_head.weight"] for name in "ab")
    assert torch.equal(found["lm_head.weight"][:30], b) and torch.equal(found["lm_head.weight"][30], a[30])


NO_CONTRADICTIONS = {
    "a named pad token without a row": ({"tokenizer_config.json": {"pad_token": "<pad>"}}, {}),
    "an added pad token without a row": ({"tokenizer.json": word_json(30, "<pad>")}, {}),
    "other tokens beyond the embedding": (
        {"tokenizer.json": word_json(30, "<x>", "<y>")}, {"tokenizer.json": word_json(30, "[PAD]")},
    ),
    "more words than rows": ({"tokenizer.json": word_json(32)}, {"tokenizer.json": word_json(34)}),
    "another form": ({}, {"tokenizer.json": word_json(30)}),
    "an older file that nobody reads": (
        {"tokenizer_config.json": {"added_tokens_decoder": {}}, "added_tokens.json": {"<x>": 3}}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(NO_CONTRADICTIONS))
def test_what_is_no_contradiction(case, tmp_path):
    base = {"vocab.json": words(30)}
    left, right = NO_CONTRADICTIONS[case]
    experts = pair(tmp_path, (30, base | left), (30, base | right))
    found = mixed(experts, tmp_path / "out", "hf")
    held = [tensors(folder)["lm_head.weight"] for folder in experts.values()]
    assert torch.equal(found["lm_head.weight"], mean(held))


def test_three_models_and_their_owners(tmp_path):
    """Each row over exactly those whose token it is."""
    counts = {"a": 28, "b": 30, "c": 31}
    experts = {
        name: model(tmp_path / "sources" / name, seed, 32, {"vocab.json": words(count)})
        for seed, (name, count) in enumerate(counts.items())
    }
    for number, order in enumerate(itertools.permutations(experts)):
        out = tmp_path / f"out{number}"
        found = mixed({name: experts[name] for name in order}, out, "hf", "--vocab=union")["lm_head.weight"]
        held = {name: tensors(folder)["lm_head.weight"] for name, folder in experts.items()}
        assert torch.equal(found[28:30], mean([held["b"][28:30], held["c"][28:30]]))
        assert torch.equal(found[30], held["c"][30])
        assert len(known_vocabulary({"hf_folder": out}).tokens) == 31


# --- proof ----------------------------------------------------------------------------------------------------


def test_verify_sees_a_wrong_average(tmp_path, capsys, monkeypatch):
    """The rule itself is wrong here, in writing and in checking alike: looking rows up by their token shows it."""

    def of_all(self, plan, planned, start, stop):
        yield start, stop, planned.parts

    monkeypatch.setattr(operations.Average, "stretches", of_all)
    experts = pair(tmp_path, (32, {"vocab.json": words(30)}), (32, {"vocab.json": words(31)}))
    message = refused(
        [*expert_words(experts), "--vocab=union", "--verify", "--allow-other-ids"], tmp_path / "out", capsys
    )
    assert "row 30 ('word30') is not the average of the models that know this token" in message


def test_verify_sees_a_row_that_is_no_number():
    """Nothing is larger than nan: a comparison by size alone would let it pass."""
    held = torch.tensor([[1.0, 2.0], [3.0, math.nan], [math.inf, 5.0]])
    written = held.clone()
    assert rows_proof.first_unequal(written, held) is None
    written[0, 1] = math.nan
    assert rows_proof.first_unequal(written, held) == 0
    assert rows_proof.first_unequal(held, torch.ones_like(held)) == 0


def test_verify_sees_wrong_new_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compute, "mean_row", lambda plan, planned: torch.zeros(planned.shape[1:]))
    experts = pair(tmp_path, (31, {"vocab.json": words(31)}), (31, {"vocab.json": words(31)}))
    flags = ["--pad-vocab-to-multiple-of=8", "--verify", "--allow-other-ids"]
    message = refused([*expert_words(experts), *flags], tmp_path / "out", capsys)
    assert "rows from 31 on are not the mean of the tokens' rows" in message


def test_verify_sees_the_wrong_tokenizer(tmp_path, capsys, monkeypatch):
    """The smaller model's tokenizer beside the larger one's rows."""
    monkeypatch.setattr(Source, "token_count", property(lambda source: -ord(source.name)))
    experts = pair(tmp_path, (32, {"vocab.json": words(30)}), (32, {"vocab.json": words(31)}))
    monkeypatch.setattr("megatron_btx.mixing.compatible._check_tokenizers", lambda *_: None)
    message = refused(
        [*expert_words(experts), "--vocab=union", "--verify", "--allow-other-ids"], tmp_path / "out", capsys
    )
    assert "the tokenizer that was written says token 30 is None, it is 'word30' in b" in message


def test_the_plan_says_whose_rows_are_whose(tmp_path, capsys):
    base = {"vocab.json": words(30)}
    experts = pair(
        tmp_path, (33, base | {"added_tokens.json": {"<x>": 30}}), (30, base | {"added_tokens.json": {"<y>": 30}})
    )
    assert main([*expert_words(experts), "--vocab=union", "--dry-run", "--allow-other-ids"]) == 0
    said = capsys.readouterr().out
    assert f"vocabulary of a: 31 tokens in 33 rows, by {experts['a'] / 'vocab.json'}" in said
    assert "vocabulary of b: 30 tokens in 30 rows" in said and "1 more tokens have no row" in said
    assert "vocabulary of the result: that of a with 31 tokens, 33 rows" in said
    assert main([*expert_words(experts), "--vocab=union", "--explain", "output_layer.weight", "--allow-other-ids"]) == 0
    said = capsys.readouterr().out
    assert "rows 0:30" in said and "a: lm_head.weight (head.weight), b: lm_head.weight" in said
    assert "rows 30:31: mean of all from a: lm_head.weight (head.weight)\n" in said


# --- rows that are added --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
def test_added_rows_are_the_mean_of_the_tokens(format_, tmp_path, capsys):
    """33 rows, of which 31 are tokens, become 40; old rows and the function of the model stay."""
    experts = pair(tmp_path, (33, {"vocab.json": words(31)}), (33, {"vocab.json": words(31)}))
    plain = mixed(experts, tmp_path / "plain", format_)
    capsys.readouterr()
    found = mixed(experts, tmp_path / "out", format_, "--pad-vocab-to-multiple-of=8")
    assert "40 rows, 7 of them new rows, each the mean of all tokens' rows" in capsys.readouterr().out
    for key in KEYS:
        assert torch.equal(found[key][:33], plain[key])
        assert torch.equal(found[key][33:], plain[key][:31].double().mean(0).float().expand(7, -1))
    if format_ == "megatron":
        stored = TorchDistReader(resolve_iteration(tmp_path / "out")).arguments()
        assert stored["padded_vocab_size"] == 40
        assert "--padded-vocab-size 40" in (tmp_path / "out" / "megatron_args.txt").read_text()
    else:
        assert config_of(tmp_path / "out")["vocab_size"] == 40


def test_added_rows_are_never_averaged(tmp_path, capsys):
    """The padded model as an expert: its new rows are padding, beside the tokens of another."""
    experts = pair(tmp_path, (30, {"vocab.json": words(30)}), (32, {"vocab.json": words(32)}))
    padded = tmp_path / "sources" / "padded"
    options = ["--hf-model", str(experts["a"]), "--output", str(padded), "--pad-vocab-to-multiple-of", "16", "--verify"]
    assert convert_hf.main(["import", "--allow-other-ids", *options]) == 0
    assert "all rows of 30 tokens are the model's own" in capsys.readouterr().out, "one model has no means"
    assert open_source("padded", padded).token_rows("head.weight") == ((0, 30),)
    flags = ["--vocab=union", "--take=dtype=b"]
    found = mixed({"padded": padded, "b": experts["b"]}, tmp_path / "out", "hf", *flags)
    assert "all rows of 32 tokens are what the models that know the token give" in capsys.readouterr().out
    for key in KEYS:
        assert torch.equal(found[key][30:], tensors(experts["b"])[key][30:])


def test_added_rows_hardly_change_the_loss(tmp_path):
    """A row of zeros would get a logit of 0 among logits far below it; the mean row gets less than an average token."""
    source = model(tmp_path / "source", 1, 33, {"vocab.json": words(33)})
    weights = tensors(source)
    weights["lm_head.weight"] += 40 * weights["model.norm.weight"].sign()  # no logit is near 0
    (source / "model.safetensors").write_bytes(safetensors_bytes(weights))
    out = tmp_path / "out"
    assert (
        convert_hf.main(["import", "--allow-other-ids", "--hf-model", str(source), "--output", str(tmp_path / "m")])
        == 0
    )
    options = ["--checkpoint", str(tmp_path / "m"), "--output", str(out), "--pad-vocab-to-multiple-of=64"]
    assert convert_hf.main(["export", "--allow-other-ids", *options]) == 0
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        before, after = (loaded(folder)(tokens).logits.double() for folder in (source, out))
    assert before.shape[-1] == 33 and after.shape[-1] == 64
    torch.testing.assert_close(after[..., :33], before, rtol=1e-5, atol=1e-5)
    lost = after.logsumexp(-1) - before.logsumexp(-1)
    assert lost.min() >= 0 and lost.max() <= math.log(1 + 31 / 33) + 1e-6
    zero_rows = torch.cat([before, torch.zeros(1, 32, 31, dtype=torch.double)], -1)
    assert (zero_rows.logsumexp(-1) - before.logsumexp(-1)).max() > 10, "else zeros would do as well"


def test_tied_embeddings_are_padded_too(tmp_path):
    source = model(tmp_path / "source", 1, 31, {"vocab.json": words(31)}, tie_word_embeddings=True)
    out = tmp_path / "out"
    assert (
        convert_hf.main(
            [
                "import",
                "--allow-other-ids",
                "--hf-model",
                str(source),
                "--output",
                str(out),
                "--pad-vocab-to-multiple-of=4",
            ]
        )
        == 0
    )
    assert open_source("m", out).pieces["embedding.weight"].shape == (32, HIDDEN)


@pytest.mark.parametrize("number", ["0", "-8", "1000000"])
def test_a_multiple_that_is_none(number, tmp_path, capsys):
    experts = pair(tmp_path, (31, {"vocab.json": words(31)}), (31, {"vocab.json": words(31)}))
    message = refused([*expert_words(experts), f"--pad-vocab-to-multiple-of={number}"], tmp_path / "out", capsys)
    assert "--pad-vocab-to-multiple-of" in message and "expected 1 to" in message


@pytest.mark.parametrize(("rows", "sizes"), [(31, "2 or 4 or 8"), (36, "8"), (32, "")])
def test_the_plan_names_the_flag_where_rows_do_not_divide(rows, sizes, tmp_path, capsys):
    source = model(tmp_path / "source", 1, rows, {"vocab.json": words(30)})
    assert convert_hf.main(["import", "--allow-other-ids", "--hf-model", str(source), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (f"tensor parallel size of {sizes}, which" in said) == bool(sizes)
    assert ("--pad-vocab-to-multiple-of" in said) == bool(sizes)


# --- Megatron checkpoints of strangers ------------------------------------------------------------------------


@pytest.fixture
def strangers(tmp_path: Path) -> dict[str, Path]:
    """Two Megatron checkpoints of 32 rows, whose arguments name a vocabulary of 30 words on another machine."""
    found = {}
    for seed, name in enumerate("ab"):
        source = model(tmp_path / "folders" / name, seed, 32, {})
        megatron = tmp_path / "imported" / name
        assert (
            convert_hf.main(["import", "--allow-other-ids", "--hf-model", str(source), "--output", str(megatron)]) == 0
        )
        arguments = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/gone/words.json", "vocab_size": None}
        found[name] = rewrite(megatron, tmp_path / "sources" / name, arguments=arguments)
    return found


def test_a_tokenizer_on_another_machine(strangers, tmp_path, capsys):
    """Named with its path; put beside the checkpoint it is found, and tells padding from tokens."""
    message = refused(expert_words(strangers), tmp_path / "out", capsys)
    assert "a: its tokenizer /gone/words.json cannot be found" in message and "beside the model" in message
    assert "--allow-other-tokenizer" in message
    for folder in strangers.values():
        (folder / "words.json").write_text(json.dumps(words(30)))
    assert open_source("a", strangers["a"]).token_rows("embedding.weight") == ((0, 30),)
    mix(strangers, tmp_path / "out", "--verify", "--allow-other-ids")
    (strangers["b"] / "words.json").write_text(json.dumps(words(29) | {"x": 29}))
    message = refused(expert_words(strangers), tmp_path / "other", capsys)
    assert "token 29 is 'word29' in a and 'x' in b" in message


def test_a_tokenizer_folder_on_another_machine(strangers, tmp_path):
    """Its files, put in the checkpoint's own folder for them, are the tokenizer, for the flags that continue too."""
    arguments = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/gone/folder", "vocab_file": None}
    moved = {
        name: rewrite(folder, tmp_path / "moved" / name, arguments=arguments) for name, folder in strangers.items()
    }
    for folder in moved.values():
        (folder / "huggingface").mkdir()
        (folder / "huggingface" / "tokenizer.json").write_text(json.dumps(word_json(30, "<pad>")))
    assert open_source("a", moved["a"]).token_rows("embedding.weight") == ((0, 31),)
    out = mix(moved, tmp_path / "out", "--verify", "--allow-other-ids")
    place = str(moved["a"] / "huggingface")
    assert f"--tokenizer-model {place}" in (out / "megatron_args.txt").read_text()


def test_a_tokenizer_with_tokens_beyond_its_rows_is_not_put_beside_more_rows(tmp_path):
    """Both have 30 tokens with rows; in the result's 32 rows <y> would seem to have one."""
    base = {"vocab.json": words(30)}
    experts = pair(tmp_path, (30, base | {"added_tokens.json": {"<y>": 30}}), (32, base))
    mixed(experts, tmp_path / "out", "hf")
    assert known_vocabulary({"hf_folder": tmp_path / "out"}).tokens == dict(enumerate(words(30)))


@pytest.mark.parametrize("size", [None, 30, 32])
def test_a_stored_size_with_and_without_padding(size, strangers, tmp_path):
    """The table tells the tokens, whatever the arguments count; without it, they are all there is."""
    one = rewrite(strangers["a"], tmp_path / "one", arguments={"vocab_size": size})
    expected = ((0, size or 32),)
    assert open_source("one", one).token_rows("embedding.weight") == expected
    (one / "words.json").write_text(json.dumps(words(30)))
    assert open_source("one", one).token_rows("embedding.weight") == ((0, 30),)
