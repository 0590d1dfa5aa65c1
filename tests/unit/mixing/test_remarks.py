"""Values that differ between experts and change no number: named with their owner, or taken by choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.mixing.cli import main
from tests.unit.mixing.checkpoints import expert_words, refused
from tests.unit.mixing.folders import CONFIG, llama_folder


@pytest.fixture
def pair(tmp_path) -> dict[str, Path]:
    """Two experts that were trained in other ways."""
    folders = {name: llama_folder(tmp_path / name, seed) for seed, name in enumerate(("math", "code"))}
    fields = {"attention_dropout": 0.1, "initializer_range": 0.006, "pad_token_id": 5}
    for name, more in {"math": {"pad_token_id": 3}, "code": fields}.items():
        (folders[name] / "config.json").write_text(json.dumps(CONFIG | more))
    return folders


def test_what_is_taken_from_the_first_is_said(pair, tmp_path, capsys):
    words = [*expert_words(pair), "--output-format", "hf", "--dry-run", "--output", str(tmp_path / "mix")]
    assert main(words) == 0
    notes = [line.strip() for line in capsys.readouterr().out.splitlines() if "differs:" in line]
    assert notes == [
        "note: attention_dropout differs: 0.0 in math, 0.1 in code; the result has that of math "
        "(--take attention_dropout=NAME for another)",
        "note: init_method_std differs: 0.02 in math, 0.006 in code; the result has that of math "
        "(--take init_method_std=NAME for another)",
        "note: pad_token_id differs: 3 in math, 5 in code; the result has that of math, whose tokenizer it gets",
    ]


def test_what_is_chosen_is_written_and_no_longer_said(pair, tmp_path, capsys):
    chosen = ["--take", "attention_dropout=code", "--take", "initializer_range=code"]
    assert main([*expert_words(pair), "--output-format", "hf", "--output", str(tmp_path / "mix"), *chosen]) == 0
    config = json.loads((tmp_path / "mix" / "config.json").read_text())
    assert (config["attention_dropout"], config["initializer_range"]) == (0.1, 0.006)
    said = capsys.readouterr().out
    assert "attention_dropout differs" not in said and "init_method_std differs" not in said


def test_equal_experts_get_no_remark(tmp_path, capsys):
    folders = {name: llama_folder(tmp_path / name, seed) for seed, name in enumerate(("math", "code"))}
    assert main([*expert_words(folders), "--dry-run"]) == 0
    assert "differs:" not in capsys.readouterr().out


TEMPLATES = {
    "before and nothing": ("<s> $A", None, {}),
    "both sides and before": ("<s> $A </s>", "<s> $A", {}),
    "before and after": ("<s> $A", "$A <s>", {}),
    "a setting": (None, None, {"add_bos_token": True}),
    "a setting against a template": ("<s> $A", "<s> $A", {"add_bos_token": True, "add_eos_token": True}),
}


def with_tokenizer(folder: Path, template: str | None, **config: object) -> Path:
    """A folder with a tokenizer of words that puts tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1, "word": 2, "</s>": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    if template:
        used = [(word, made.token_to_id(word)) for word in template.split() if word != "$A"]
        made.post_processor = processors.TemplateProcessing(template, special_tokens=used)
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | config))
    return folder


@pytest.mark.parametrize("case", TEMPLATES)
def test_what_is_put_around_a_text_is_compared(case, tmp_path, capsys):
    """Ids of a text's own tokens are equal, and one model was trained with a token before each of them."""
    from transformers import AutoTokenizer

    one, other, config = TEMPLATES[case]
    (tmp_path / "experts").mkdir()
    math = with_tokenizer(llama_folder(tmp_path / "experts" / "math", 0), one)
    code = with_tokenizer(llama_folder(tmp_path / "experts" / "code", 1), other, **config)
    whole = AutoTokenizer.from_pretrained(code)("word")["input_ids"]
    for number, experts in enumerate(({"math": math, "code": code}, {"code": code, "math": math})):
        words = [*expert_words(experts), "--output-format", "hf"]
        message = refused(words, tmp_path / "out", capsys)
        assert "what they put around a text" in message and "--take tokenizer=code" in message
        target = tmp_path / f"mix{number}"
        assert main([*words, "--output", str(target), "--take", "tokenizer=code"]) == 0
        assert AutoTokenizer.from_pretrained(target)("word")["input_ids"] == whole
        capsys.readouterr()
        assert main([*words, "--output", str(tmp_path / "x"), "--allow-other-tokenizer", "--dry-run"]) == 0
        assert "what they put around a text differs: " in capsys.readouterr().out


def test_the_same_around_a_text_in_another_form(tmp_path, capsys):
    """A setting beside the template says what the template does."""
    math = with_tokenizer(llama_folder(tmp_path / "math", 0), "<s> $A")
    code = with_tokenizer(llama_folder(tmp_path / "code", 1), "<s> $A", add_bos_token=True)
    assert main([*expert_words({"math": math, "code": code}), "--dry-run"]) == 0
    assert "around a text" not in capsys.readouterr().out


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
CUTS = {
    "blanks taken by a token": ({"lstrip": True, "rstrip": True}, {}),
    "a token that is a word of its own": ({"single_word": True}, {}),
    "special tokens that are text": ({}, {"split_special_tokens": True}),
    "a word that a setting makes a token": ({}, {"added_tokens_decoder": {"2": FLAGS | {"content": "word"}}}),
    "a class that builds its own": ({}, {"tokenizer_class": "Qwen2Tokenizer"}),
}


def byte_level(folder: Path, flags: dict[str, bool], **config: object) -> Path:
    """A folder with a byte-level tokenizer whose first cut is not Qwen's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = ["</s>", "12", "word", "<t>", "\u0120", *"ab12xword<>t/s"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["</s>", AddedToken("<t>", normalized=False, **flags)])
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | config))
    return folder


@pytest.mark.parametrize("case", CUTS)
def test_texts_that_are_cut_otherwise_are_refused(case, tmp_path, capsys):
    """The tables are equal, and so are the files' rules: transformers is asked."""
    from transformers import AutoTokenizer

    flags, config = CUTS[case]
    (tmp_path / "experts").mkdir()
    math = byte_level(llama_folder(tmp_path / "experts" / "math", 0), {})
    code = byte_level(llama_folder(tmp_path / "experts" / "code", 1), flags, **config)
    text = "a <t> b<t>b <t> 12 xwordx"
    ids = AutoTokenizer.from_pretrained(code)(text)["input_ids"]
    assert ids != AutoTokenizer.from_pretrained(math)(text)["input_ids"]
    for number, experts in enumerate(({"math": math, "code": code}, {"code": code, "math": math})):
        words = [*expert_words(experts), "--output-format", "hf"]
        message = refused(words, tmp_path / "out", capsys)
        assert "tokenizers differ: " in message and "--take tokenizer=code" in message
        target = tmp_path / f"mix{number}"
        assert main([*words, "--output", str(target), "--take", "tokenizer=code"]) == 0
        assert AutoTokenizer.from_pretrained(target)(text)["input_ids"] == ids
    capsys.readouterr()
    assert main([*words, "--dry-run", "--allow-other-tokenizer"]) == 0
    assert "the ids of the text " in capsys.readouterr().out


def test_equal_tokenizers_in_other_words_are_mixed(tmp_path, capsys):
    """Other bytes, a chat template, flags that change no ids, a larger table: nothing is cut otherwise."""
    math = byte_level(llama_folder(tmp_path / "math", 0), {})
    code = byte_level(llama_folder(tmp_path / "code", 1), {}, chat_template="x", add_prefix_space=False)
    content = json.loads((code / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": content["added_tokens"][-1]["id"] + 1})
    content["added_tokens"][-1]["content"] = "<tool>"
    assert main([*expert_words({"math": math, "code": code}), "--dry-run"]) == 0
    (code / "tokenizer.json").write_text(json.dumps(content))
    assert main([*expert_words({"math": math, "code": code}), "--dry-run", "--vocab", "union"]) == 0
    assert "tokenizers differ" not in capsys.readouterr().out


def test_a_tokenizer_that_lacks_tokens_cannot_be_taken(tmp_path, capsys):
    math, code = (
        with_tokenizer(llama_folder(tmp_path / "e" / name, n), None) for n, name in enumerate(("math", "code"))
    )
    content = json.loads((code / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 4, "content": "<tool>"})
    (code / "tokenizer.json").write_text(json.dumps(content))
    words = [*expert_words({"math": math, "code": code}), "--vocab", "union"]
    assert "take code" in refused([*words, "--take", "tokenizer=math"], tmp_path / "out", capsys)
    assert main([*words, "--take", "tokenizer=code", "--dry-run"]) == 0


def test_chat_templates_that_differ_are_said(tmp_path, capsys):
    folders = {name: with_tokenizer(llama_folder(tmp_path / name, n), None) for n, name in enumerate(("math", "code"))}
    assert main([*expert_words(folders), "--dry-run"]) == 0
    assert "chat templates" not in capsys.readouterr().out
    (folders["code"] / "additional_chat_templates").mkdir()
    (folders["code"] / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert main([*expert_words(folders), "--dry-run"]) == 0
    assert "chat templates differ between sources; the result has those of math" in capsys.readouterr().out


def test_weights_that_are_the_same_or_have_nothing_in_common_are_said(experts, tmp_path, capsys):
    """A model given twice, under whatever name; models of two bases; branches of one seed get no word."""
    same, other = llama_folder(tmp_path / "same", 1), llama_folder(tmp_path / "other", 2)
    folders = {"math": llama_folder(tmp_path / "math", 1), "code": same, "wiki": other}
    assert main([*expert_words(folders), "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert [line.split("note: ")[1].split(":")[0].split(" the same")[0] for line in notes] == [
        "no source has a tokenizer's files",
        "math and code have", "math and wiki do not resemble each other", "code and wiki do not resemble each other",
    ]  # fmt: skip
    assert main([*expert_words(experts), "--dry-run"]) == 0
    assert "resemble" not in (said := capsys.readouterr().out) and "given twice" not in said
