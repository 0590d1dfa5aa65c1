"""Results that were moved, or that lie in a path with blanks: the flags beside them hold, the tokenizer is found."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_btx.common.errors import CheckpointError
from megatron_btx.engine.program import find_tokenizer
from megatron_btx.mixing.cli import main
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FILES, as_shell_word, locate_tokenizer
from tests.support import pico
from tests.unit.mixing.checkpoints import expert_words
from tests.unit.mixing.test_vocabularies import model, words

ROWS = 128


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """A mixture of two Hugging Face models, in a folder whose name has blanks and a bracket."""
    folder = tmp_path_factory.mktemp("moved")
    tokenizer = Tokenizer(models.WordLevel(words(96), unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    files["tokenizer_config.json"] |= {"eos_token": "word1"}
    sources = {name: model(folder / name, seed, ROWS, files) for seed, name in enumerate(("math", "code"))}
    out = folder / "my mix [1]"
    assert main([*expert_words(sources), "--output", str(out)]) == 0
    return out


def in_bash(folder: Path) -> list[str]:
    """The words that ``$(cat megatron_args.txt)`` becomes in a shell."""
    script = f'printf "%s\\n" $(cat {shlex.quote(str(folder / "megatron_args.txt"))})'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()


def arguments_of(flags: list[str], root: Path, **more: object) -> Namespace:
    """What Megatron's parser makes of the flags that concern the tokenizer."""
    given = {name: None for name in ("tokenizer_type", *TOKENIZER_FILES)}
    for name in given:
        flag = "--" + name.replace("_", "-")
        given[name] = flags[flags.index(flag) + 1] if flag in flags else None
    others = {"use_checkpoint_args": False, "use_tokenizer_model_from_checkpoint_args": True, "load": None}
    return Namespace(**given, **others | {"pretrained_checkpoint": str(root)} | more)


def test_a_path_with_blanks_stays_one_word_in_a_shell(result):
    flags = in_bash(result)
    assert flags[flags.index("--tokenizer-model") + 1] == str(result / "huggingface")
    assert len(flags) == len((result / "megatron_args.txt").read_text().split())


def test_a_plain_path_is_written_as_it_is():
    assert as_shell_word("/a/b-c_d.e/huggingface") == "/a/b-c_d.e/huggingface"
    assert as_shell_word("/a b/c[1]*?\\") == "/a?b/c?1]???"


@pytest.mark.parametrize("name", ["elsewhere", "else where"])
def test_the_tokenizer_moves_along(name, result, tmp_path, capsys):
    """The flags name a folder that is gone; that beside the checkpoint is the same."""
    moved = Path(shutil.copytree(result, tmp_path / name))
    kept = result.rename(result.with_name("gone"))
    try:
        args = find_tokenizer(arguments_of(in_bash(moved), moved))
    finally:
        kept.rename(result)
    assert args.tokenizer_model == str(moved / "huggingface")
    assert "is not there" in capsys.readouterr().out


def test_what_the_checkpoint_itself_stores_is_found_too(result, tmp_path):
    """With --use-checkpoint-args Megatron takes the stored path instead of the given one."""
    moved = Path(shutil.copytree(result, tmp_path / "elsewhere"))
    kept = result.rename(result.with_name("gone"))
    try:
        args = find_tokenizer(arguments_of([], moved, use_checkpoint_args=True, load=str(moved)))
    finally:
        kept.rename(result)
    assert args.tokenizer_model == str(moved / "huggingface") and args.tokenizer_type == "HuggingFaceTokenizer"
    assert not args.use_tokenizer_model_from_checkpoint_args


def test_a_tokenizer_that_is_there_is_kept(result, capsys):
    args = arguments_of(in_bash(result), result)
    assert vars(find_tokenizer(args)) == vars(args) and capsys.readouterr().out == ""


def test_a_name_on_the_hub_is_kept(result):
    args = arguments_of(["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "org/name"], result)
    assert find_tokenizer(args).tokenizer_model == "org/name"


def test_a_file_is_found_by_its_name(tmp_path):
    (tmp_path / "my tokenizer.model").touch()
    given = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/gone/my tokenizer.model"}
    assert locate_tokenizer(given, tmp_path)["tokenizer_model"] == str(tmp_path / "my tokenizer.model")


def test_a_pointer_is_no_tokenizer_for_training(result, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a pointer of Git LFS"):
        find_tokenizer(arguments_of(flags, result))


def test_training_goes_on_from_a_moved_result(result, zygote, corpus, tmp_path):
    """In the real program, with the flags as a shell gives them."""
    moved = Path(shutil.copytree(result, tmp_path / "else where"))
    kept = result.rename(result.with_name("gone"))
    try:
        flags = [*in_bash(moved), *pico.TRAINING, "--train-iters", "1", "--train-data-path", str(corpus)]
        flags += ["--pretrained-checkpoint", str(moved), "--data-cache-path", str(tmp_path / "cache")]
        run = zygote.run(1, [*flags, "--no-persist-layer-norm", "--btx-first-loss-bound", "99"], tmp_path / "log")
    finally:
        kept.rename(result)
    assert f"{moved / 'huggingface'} is used" in run.text()
