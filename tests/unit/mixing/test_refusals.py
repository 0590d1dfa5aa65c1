"""What the converter refuses: one line that names what, where and the remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mixing import mix, rewrite
from tests.support.runner import REPOSITORY
from tests.unit.mixing.checkpoints import expert_words, refused

# --- the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["0 expert given", "at least 2", "--expert NAME=PATH"]),
        (["--expert=a={dense}"], ["1 expert given", "at least 2"]),
        (["--expert=a={dense}", "--expert=a={dense}"], ["--expert a=", "given twice"]),
        (["--expert=a={dense}", "--expert={dense}"], ["--expert", "{dense}", "expected NAME=PATH"]),
        (["--expert=a={dense}", "--expert==x"], ["--expert =x", "expected NAME=PATH"]),
        (["--expert=a={dense}", "--expert=b="], ["--expert b=", "expected NAME=PATH"]),
        (["--expert=a={dense}", "--expert=b=/no/where"], ["/no/where", "no such folder"]),
        (["--expert=a={dense}", "--expert=b={dense}", "--moe-router-topk=3"], ["--moe-router-topk 3", "1 to 2"]),
        (["--expert=a={dense}", "--expert=b={dense}", "--moe-router-topk=0"], ["--moe-router-topk 0", "1 to 2"]),
        (["--expert=a={dense}", "--expert=b={dense}", "--moe-router-topk=-1"], ["--moe-router-topk -1", "1 to 2"]),
    ],
)
def test_bad_command_lines(words, named, dense, tmp_path, capsys):
    message = refused([word.format(dense=dense) for word in words], tmp_path / "out", capsys)
    for text in named:
        assert text.format(dense=dense) in message


def test_no_output_is_named(dense, capsys):
    from megatron_btx.mixing.cli import main

    assert main(expert_words({"a": dense, "b": dense})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--output is missing" in error and "--dry-run" in error


def test_bad_values_of_flags_are_argparses(tmp_path):
    """Unknown flags and values that are no numbers: usage and exit code 2."""
    from megatron_btx.mixing.cli import main

    for words in (["--no-such-flag"], ["--moe-router-topk", "two"], ["--method", "merge"]):
        with pytest.raises(SystemExit) as end:
            main([*words, "--output", str(tmp_path / "out")])
        assert end.value.code == 2


def test_the_tool_itself(tmp_path):
    """The script under tools/ exits with 2 and one line, before torch is imported for nothing."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_experts.py")]
    run = subprocess.run([*tool, "--expert", "math"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "error: --expert math: expected NAME=PATH, as --expert math=runs/math/checkpoint"
    ]
    check = "import sys, megatron_btx.mixing.cli as c; c.parser(); assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)


# --- models that do not fit together --------------------------------------------------------------------------

OTHER_ARGUMENTS = {
    "norm epsilon": (
        {"layernorm_epsilon": 1e-6},
        ["layernorm_epsilon", "1e-05", "1e-06", "--take layernorm_epsilon=left"],
    ),
    "rotary base": ({"rotary_base": 500000}, ["rotary_base", "10000", "500000", "--take rotary_base=left", "=right"]),
    "rope scaling": ({"use_rope_scaling": True}, ["use_rope_scaling", "False", "True"]),
    "norms around one": ({"layernorm_zero_centered_gamma": True}, ["layernorm_zero_centered_gamma", "False", "True"]),
    "window": ({"window_size": (8, 0)}, ["window_size", "None", "(8, 0)"]),
    "clamped activation": ({"activation_func_clamp_value": 7.0}, ["activation_func_clamp_value", "None", "7.0"]),
    "offset of the gate": ({"glu_linear_offset": 1.0}, ["glu_linear_offset", "0.0", "1.0"]),
    "layers without rope": ({"no_rope_freq": 4}, ["no_rope_freq", "None", "4"]),
    "layers without window": ({"window_attn_skip_freq": 2}, ["window_attn_skip_freq", "None", "2"]),
    "mup": ({"use_mup": True}, ["use_mup", "False", "True"]),
}


@pytest.mark.parametrize("case", list(OTHER_ARGUMENTS))
def test_other_model_arguments(case, dense, tmp_path, capsys):
    """Equal shapes, another function: the argument, both values and both names."""
    arguments, named = OTHER_ARGUMENTS[case]
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", arguments=arguments)
    message = refused(expert_words({"left": dense, "right": other}), tmp_path / "out", capsys)
    for text in [*named, "left", "right", "one seed"]:
        assert text in message


def test_arguments_that_are_not_the_tensors(dense, tmp_path, capsys):
    """A configuration that its own tensors contradict: the expert, the tensor, both shapes."""
    for number, (arguments, named) in enumerate(
        [
            ({"hidden_size": 64}, ["word_embeddings", "[128, 32]", "[128, 64]"]),
            ({"ffn_hidden_size": 96}, ["linear_fc1"]),
        ]
    ):
        (tmp_path / "sources").mkdir(exist_ok=True)
        other = rewrite(dense, tmp_path / "sources" / str(number), arguments=arguments)
        message = refused(expert_words({"left": dense, "right": other}), tmp_path / "out", capsys)
        for text in [*named, "right", str(other), "do not belong together"]:
            assert text in message


OTHER_TENSORS = {
    "missing key": (lambda key, t: None if key == "output_layer.weight" else t, ["output_layer.weight is missing"]),
    "other shape": (
        lambda key, t: t[:64] if key == "output_layer.weight" else t,
        ["output_layer.weight", "[128, 32]", "[64, 32]"],
    ),
    "other dtype": (
        lambda key, t: t.double() if key == "output_layer.weight" else t,
        ["output_layer.weight", "float32", "float64"],
    ),
}


@pytest.mark.parametrize("case", list(OTHER_TENSORS))
def test_other_tensors(case, dense, tmp_path, capsys):
    """In either order: the key and what each expert has."""
    change, named = OTHER_TENSORS[case]
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", change)
    for experts in ({"left": dense, "right": other}, {"right": other, "left": dense}):
        message = refused(expert_words(experts), tmp_path / "out", capsys)
        for text in (
            [*named, "right", str(other)] if case != "other dtype" else [*named, "left", "right", "--take dtype="]
        ):
            assert text in message


def renamed(dense: Path, target: Path, pattern: str, replacement: str) -> Path:
    """A copy in whose index one key has another name."""
    import re

    shutil.copytree(dense / "iter_0000010", target)
    file = target / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.state_dict_metadata = {re.sub(pattern, replacement, k): v for k, v in index.state_dict_metadata.items()}
    index.storage_data = {
        type(k)(re.sub(pattern, replacement, k.fqn), k.offset, k.index): v for k, v in index.storage_data.items()
    }
    file.write_bytes(pickle.dumps(index))
    return target


def test_a_key_that_no_rule_takes(dense, tmp_path, capsys):
    """An architecture we do not know is refused by name, even when all experts have it."""
    (tmp_path / "sources").mkdir()
    odd = renamed(
        dense, tmp_path / "sources" / "odd", r"^optimizer\.state\.exp_avg\.output_layer", "output_layer.scale"
    )
    message = refused(expert_words({"a": odd, "b": odd}), tmp_path / "out", capsys)
    assert "output_layer.scale" in message and "not supported" in message and str(odd) in message


def test_a_model_without_embeddings(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    odd = rewrite(dense, tmp_path / "sources" / "odd", lambda key, t: None if key.startswith("embedding") else t)
    message = refused(expert_words({"a": odd, "b": odd}), tmp_path / "out", capsys)
    assert "word_embeddings" in message and str(odd) in message


def test_layers_half_numbered(dense, tmp_path, capsys):
    """Layers that are stacked in some keys and numbered in others are no form that anything writes."""
    (tmp_path / "sources").mkdir()
    odd = renamed(dense, tmp_path / "sources" / "odd", r"^decoder\.layers\.mlp", "decoder.layers.0.mlp")
    message = refused(expert_words({"a": dense, "b": odd}), tmp_path / "out", capsys)
    assert "b (" in message and "decoder.layers.0.self_attention" in message and "is missing" in message


def test_a_mixture_is_no_expert(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    mixture = mix({"a": dense, "b": dense}, tmp_path / "sources" / "mix")
    message = refused(expert_words({"a": dense, "b": mixture}), tmp_path / "out", capsys)
    assert "b (" in message and "mixture of 2 experts" in message and "dense" in message


# --- tokenizers -----------------------------------------------------------------------------------------------


def tokenizer_pair(tmp_path: Path, dense: Path, names: tuple[str, str], contents: tuple[bytes, bytes], **more: object):
    """Two experts whose stored arguments name tokenizer files of the same name in two folders."""
    made = {}
    for number, (name, content) in enumerate(zip(("left", "right"), contents, strict=True)):
        folder = tmp_path / "sources" / name
        folder.mkdir(parents=True)
        (folder / names[number]).write_bytes(content)
        arguments = {key: str(folder / names[number]) if value is Path else value for key, value in more.items()}
        made[name] = rewrite(dense, folder / "checkpoint", arguments=arguments)
    return made


SENTENCEPIECE = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": Path}


def test_tokenizers_of_other_content(dense, tmp_path, capsys):
    experts = tokenizer_pair(tmp_path, dense, ("t.model", "t.model"), (b"one", b"two"), **SENTENCEPIECE)
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    for text in ("tokenizers differ", "left", "right", "--allow-other-tokenizer", "is no SentencePiece model"):
        assert text in message
    mix(experts, tmp_path / "out", "--allow-other-tokenizer")


def test_tokenizers_of_equal_content_elsewhere(dense, tmp_path):
    """Never by path: other folder, other file name, same bytes."""
    experts = tokenizer_pair(tmp_path, dense, ("t.model", "other.model"), (b"one", b"one"), **SENTENCEPIECE)
    mix(experts, tmp_path / "out")


def test_a_tokenizer_that_is_gone(dense, tmp_path, capsys):
    experts = tokenizer_pair(tmp_path, dense, ("t.model", "t.model"), (b"one", b"one"), **SENTENCEPIECE)
    (tmp_path / "sources" / "right" / "t.model").unlink()
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert "right" in message and "t.model" in message and "--allow-other-tokenizer" in message


@pytest.mark.parametrize("argument", ["vocab_file", "merge_file"])
def test_vocabulary_files_are_compared_too(argument, dense, tmp_path, capsys):
    """Byte-pair tokenizers name their files in other arguments than tokenizer_model."""
    more = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None, argument: Path}
    experts = tokenizer_pair(tmp_path, dense, ("v", "v"), (b"one", b"two"), **more)
    assert "tokenizers differ" in refused(expert_words(experts), tmp_path / "out", capsys)


def test_other_kinds_and_sizes_of_tokenizer(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", arguments={"vocab_size": 97})
    message = refused(expert_words({"left": dense, "right": other}), tmp_path / "out", capsys)
    assert "left has 96 tokens" in message and "right has 97" in message and "--vocab union" in message


# --- the output -----------------------------------------------------------------------------------------------


def test_an_output_that_exists(experts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert str(tmp_path / "out") in message and "exists already" in message and "--overwrite" in message
    assert (tmp_path / "out" / "keep").read_text() == "mine"


@pytest.mark.parametrize("target", ["{root}", "{root}/iter_0000010", "{root}/..", "{root}/../link"])
def test_an_output_that_holds_a_source(target, dense, tmp_path, capsys):
    """Even with --overwrite, by another spelling of the path, or through a link."""
    root = shutil.copytree(dense, tmp_path / "folder" / "root")
    (tmp_path / "folder" / "link").symlink_to(root)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    output = Path(target.format(root=root))
    message = refused([*expert_words({"a": root, "b": dense}), "--overwrite"], output, capsys)
    assert "holds the expert a" in message
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_overwrite_replaces_nothing_but_a_checkpoint(experts, tmp_path, capsys):
    """A typing error in --output must not remove somebody's folder."""
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    message = refused([*expert_words(experts), "--overwrite"], tmp_path / "home", capsys)
    assert "home" in message and "not a checkpoint" in message
    assert (tmp_path / "home" / "thesis").is_dir()


def test_an_output_in_a_folder_that_cannot_be_made(experts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [*expert_words(experts)]
    from megatron_btx.mixing.cli import main

    assert main([*words, "--output", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "file") in error
