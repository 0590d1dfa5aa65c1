"""Values that differ between experts and change no number: named with their owner, or taken by choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.mixing.cli import main
from tests.unit.mixing.checkpoints import expert_words
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


def test_what_is_put_around_a_text_is_said(tmp_path, capsys):
    """Ids of a text's own tokens are equal, and one model was trained with a token before each of them."""
    from tokenizers import Tokenizer, models, processors

    folders = {name: llama_folder(tmp_path / name, seed) for seed, name in enumerate(("math", "code"))}
    for name, folder in folders.items():
        made = Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
        made.add_special_tokens(["<s>"])
        if name == "code":
            made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert main([*expert_words(folders), "--dry-run", "--output", str(tmp_path / "mix")]) == 0
    said = "what a tokenizer puts around a text differs: '' in math, '<s>' in code; the result has that of math"
    assert said in capsys.readouterr().out
