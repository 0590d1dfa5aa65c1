"""Every published configuration at the size of a test: converted, mixed and loaded, and docs/formats.md about it.

The document's last part is measured, not written: ``python -m tests.unit.mixing.test_compatibility`` writes it again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_btx.mixing import cli, convert_hf
from megatron_btx.tokenizers.vocabulary import known_vocabulary
from tests.support.hugging_face import (
    Older,
    assert_equal_logits,
    config_of,
    generated,
    loaded,
    logits,
    make_model,
    reference_mixture,
    router_rows,
    same_tensors,
    save,
    tensors,
)
from tests.support.public_configurations import DENSE, MIXTURES, PUBLIC, pico
from tests.support.runner import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "formats.md"
HEADING = "\n## Models that can be mixed\n"
INTRODUCTION = """
Measured by `tests/unit/mixing/test_compatibility.py`, with the published configurations at pico size. Three models
with random weights are mixed into a Hugging Face folder. They are also mixed into a Megatron checkpoint, which is
then exported. Both folders hold the same bits, the logits are right to 1e-5, and the generated text is the same.
The reference is a mixture put together by hand in transformers' own classes, under transformers 4.57 and 5. The test
fails where this file says otherwise; `python -m tests.unit.mixing.test_compatibility` writes this part again.

| Models | Written as | Remark |
|---|---|---|
"""
RELATIVES = """
Relatives with different configurations are refused until someone decides. The refusals name the flags. Here each
pair is mixed with them, taking the values of the second (`--take FIELD=NAME`):

| Models | Mixed with |
|---|---|
"""
PAIRS = (
    ("Llama-2-7b", "CodeLlama-7b"),
    ("Llama-2-13b", "CodeLlama-13b"),
    ("Llama-2-7b", "CodeLlama-7b-Python"),
    ("Meta-Llama-3-8B", "Llama-3.1-8B"),
    ("Mistral-7B-v0.1", "Mistral-7B-v0.2"),
    ("Qwen2.5-1.5B", "Qwen2.5-Math-1.5B"),
    ("Qwen2.5-1.5B", "Qwen2.5-Coder-1.5B"),
    ("Qwen2.5-7B", "Qwen2.5-Math-7B"),
)


def run(main: Any, words: list[str]) -> tuple[int, str]:
    """A command's exit code and what it said on its error output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(words)
    return code, error.getvalue()


def done(main: Any, *words: object) -> None:
    """Run a command that must succeed."""
    code, error = run(main, [str(word) for word in words])
    assert code == 0, error


def write_tokenizer(folder: Path, size: int, name: str = "tokenizer.json") -> dict[str, int]:
    """A tokenizer of whole words; larger ones extend smaller ones."""
    words = {f"word{n}": n for n in range(size)}
    content: dict[str, Any] = words
    if name == "tokenizer.json":
        model = {"type": "WordLevel", "vocab": words, "unk_token": "word0"}
        content = {"version": "1.0", "added_tokens": [], "model": model}
        content |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
        content["pre_tokenizer"] = {"type": "Whitespace"}
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / name).write_text(json.dumps(content))
    return words


class Bench:
    """Measures models: each once, in a folder of its own."""

    def __init__(self, folder: Path, older: Older) -> None:
        self.folder = folder
        self.older = older
        self.row = functools.cache(self._row)
        self.pair = functools.cache(self._pair)

    def _row(self, name: str) -> str:
        """What a model's line of the first table says of it."""
        config, folder = pico(PUBLIC[name]), self.folder / name
        cells = self._converted(config, folder) if name in MIXTURES else self._mixed(config, folder)
        return f"{' | '.join(cells)} |"

    def _router(self, folder: Path, config: Mapping[str, Any], experts: int) -> tuple[torch.Tensor, str]:
        rows_LEH = router_rows(config["num_hidden_layers"], experts, config["hidden_size"])
        np.save(folder / "rows.npy", rows_LEH.numpy())
        return rows_LEH, f"--router-init={folder / 'rows.npy'}"

    def _mixed(self, config: Mapping[str, Any], folder: Path) -> list[str]:
        models = [make_model(config, seed) for seed in (1, 2, 3)]
        sources = [save(model, folder / str(n), config["torch_dtype"]) for n, model in enumerate(models)]
        rows_LEH, router = self._router(folder, config, len(models))
        words = [router, *(f"--expert=e{n}={source}" for n, source in enumerate(sources))]
        done(cli.main, *words, "--output", folder / "hf", "--output-format=hf", "--verify")
        self._loads(folder / "hf", reference_mixture(models, config, rows_LEH))
        done(cli.main, *words, "--output", folder / "megatron", "--verify")
        done(convert_hf.main, "export", "--checkpoint", folder / "megatron", "--output", folder / "back")
        assert same_tensors(folder / "back", folder / "hf")
        assert config_of(folder / "back") == config_of(folder / "hf")
        remark = []
        if config_of(folder / "hf").get("tie_word_embeddings"):
            remark.append("tied embeddings")
        if "--window-size" in (folder / "megatron" / "megatron_args.txt").read_text():
            remark.append("sliding window: Megatron runs it with Transformer Engine alone")
        if "--use-rope-scaling" in (folder / "megatron" / "megatron_args.txt").read_text():
            remark.append("scaled rotary positions")
        return [config_of(folder / "hf")["architectures"][0], "; ".join(remark)]

    def _converted(self, config: Mapping[str, Any], folder: Path) -> list[str]:
        model = make_model(config, 1)
        source = save(model, folder / "source", config["torch_dtype"])
        done(convert_hf.main, "import", "--hf-model", source, "--output", folder / "megatron", "--verify")
        done(convert_hf.main, "export", "--checkpoint", folder / "megatron", "--output", folder / "back")
        assert same_tensors(folder / "back", source)
        self._loads(folder / "back", model)
        experts = [f"--expert={name}={source}" for name in "ab"]
        code, error = run(cli.main, [*experts, "--output", str(folder / "mix")])
        assert code == 2 and "is a mixture of 4 experts, expected a dense model" in error
        remark = "a mixture itself: converted there and back, not mixed again"
        return [config_of(folder / "back")["architectures"][0], remark]

    def _loads(self, folder: Path, reference: Any) -> None:
        """Both versions of transformers compute and generate what the reference does."""
        model, expected = loaded(folder), logits(reference)
        assert_equal_logits(logits(model), expected)
        in_older, tokens = self.older.load(folder)
        assert_equal_logits(in_older, expected)
        assert tokens == generated(model) == generated(reference)

    def _pair(self, first: str, second: str) -> str:
        """A pair's line of the second table."""
        folder = self.folder / f"{first}+{second}"
        configs = {"old": pico(PUBLIC[first]), "new": pico(PUBLIC[second])}
        models = {}
        for seed, (name, config) in enumerate(configs.items()):
            models[name] = make_model(config, seed)
            save(models[name], folder / name, config["torch_dtype"])
            write_tokenizer(folder / name, config["vocab_size"])
        rows_LEH, router = self._router(folder, configs["new"], 2)
        words = [router, *(f"--expert={name}={folder / name}" for name in configs)]
        flags: list[str] = []
        for _ in range(4):
            out = ["--output", str(folder / "hf"), "--output-format=hf"]
            code, error = run(cli.main, [*words, *flags, *out])
            if code == 0:
                break
            assert code == 2 and error.count("\n") == 1 and "old" in error and "new" in error, error
            assert not (folder / "hf").exists()
            fields = re.findall(r"--take (\w+)=", error)
            flags += [f"--take={field}=new" for field in fields]
            if "--vocab union" in error:
                assert f"token {configs['old']['vocab_size']} is nobody's in old" in error
                flags.append("--vocab=union")
        else:
            raise AssertionError(f"still refused with {flags}: {error}")
        assert flags, "relatives that differ in nothing are no news"
        extend(models["old"], models["new"])
        self._loads(folder / "hf", reference_mixture(list(models.values()), configs["new"], rows_LEH))
        # transformers 5 takes Qwen's own tokenizer for a dense Qwen2, not these whole words.
        done(cli.main, *words, *flags, "--output", folder / "megatron", "--allow-other-ids")
        done(convert_hf.main, "export", "--checkpoint", folder / "megatron", "--output", folder / "back")
        assert same_tensors(folder / "back", folder / "hf")
        for name in ("hf", "back"):
            # transformers 5 reads a dense Qwen2's file in a way of its own, so that it is written in another form.
            tables = [known_vocabulary({"hf_folder": folder / model}).tokens for model in (name, "new")]
            assert tables[0] == tables[1]
        shown = ", ".join(f"`{flag.removesuffix('=new').replace('=', ' ')}`" for flag in flags)
        return f"| {first}, {second} | {shown} |\n"

    def document(self) -> str:
        """The measured part of the document."""
        models: dict[str, list[str]] = {}
        for name in (*DENSE, *MIXTURES):
            models.setdefault(self.row(name), []).append(name)
        rows = "".join(f"| {', '.join(names)} | {said}\n" for said, names in models.items())
        return INTRODUCTION + rows + RELATIVES + "".join(self.pair(*pair) for pair in PAIRS)


def extend(small: Any, large: Any) -> None:
    """Give a model the rows of its relative's vocabulary that it lacks: the mean of both is then the owner's row."""
    with torch.no_grad():
        for module in ("model.embed_tokens", "lm_head"):
            mine, other = (model.get_submodule(module).weight for model in (small, large))
            mine.data = torch.cat([mine.data, other.data[len(mine) :]])


@pytest.fixture(scope="module")
def bench(older: Older, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("bench"), older)


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_published_models(name, bench):
    table = DOCUMENT.read_text().partition(INTRODUCTION)[2].partition(RELATIVES)[0]
    lines = [line.removeprefix("| ").partition(" | ") for line in table.splitlines()]
    assert [said for models, _, said in lines if name in models.split(", ")] == [bench.row(name)]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_relatives(pair, bench):
    """Refused naming what differs; mixed with what the refusals say, into the mixture made by hand."""
    assert bench.pair(*pair) in DOCUMENT.read_text()


def test_the_document_is_what_is_measured(bench):
    """All of it: no row too many, and nothing written by hand."""
    assert DOCUMENT.read_text().partition(HEADING)[2] == bench.document()


# --- vocabularies of different size ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_each_row_of_a_union_is_the_mean_over_its_owners(kind, tmp_path):
    """Rows that both have are averaged by weight; the rows of CodeLlama alone are its own, bit for bit."""
    sizes = {"llama": 160, "code": 176}
    for name, published in {"llama": "Llama-2-7b", "code": "CodeLlama-7b"}.items():
        config = pico(PUBLIC[published]) | {"torch_dtype": "float32"}
        assert config["vocab_size"] == sizes[name]
        save(make_model(config, len(name)), tmp_path / name)
        write_tokenizer(tmp_path / name, sizes[name], kind)
    words = [*(f"--expert={name}={tmp_path / name}" for name in sizes), "--weight=llama=3", "--vocab=union"]
    words += ["--take=rotary_base=code", "--take=max_position_embeddings=llama", "--output-format=hf"]
    words += ["--allow-other-ids"] if kind == "vocab.json" else []
    done(cli.main, *words, "--output", tmp_path / "out")
    llama, code, out = (tensors(tmp_path / name) for name in (*sizes, "out"))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = 0.75 * llama[key].double() + 0.25 * code[key][:160].double()
        assert torch.equal(out[key][:160], mean.float()) and torch.equal(out[key][160:], code[key][160:])
    config = config_of(tmp_path / "out")
    assert (config["vocab_size"], config["rope_theta"], config["max_position_embeddings"]) == (176, 1e6, 4096)


def test_vocabularies_that_do_not_extend_each_other(tmp_path):
    """A number that means two tokens is refused by name, whatever the sizes say."""
    for name, published in {"a": "Mistral-7B-v0.2", "b": "Mistral-7B-v0.3"}.items():
        config = pico(PUBLIC[published])
        save(make_model(config), tmp_path / name, config["torch_dtype"])
        words = write_tokenizer(tmp_path / name, config["vocab_size"])
        if name == "b":
            moved = {word: (number + 5) % len(words) for word, number in words.items()}
            model = {"type": "WordLevel", "vocab": moved, "unk_token": "word0"}
            (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": model}))
    experts = [f"--expert={name}={tmp_path / name}" for name in "ab"]
    code, error = run(cli.main, [*experts, "--vocab=union", "--output", str(tmp_path / "out")])
    assert code == 2 and "vocabularies do not extend each other" in error and "word0" in error


def main() -> None:
    """Measure everything and write the document."""
    older = Older()
    with tempfile.TemporaryDirectory() as folder:
        by_hand = DOCUMENT.read_text().partition(HEADING)[0]
        DOCUMENT.write_text(by_hand + HEADING + Bench(Path(folder), older).document())
    older.close()


if __name__ == "__main__":
    main()
