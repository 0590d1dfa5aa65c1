"""The tokenizer of a result, of every kind of source: plain AutoTokenizer of transformers 4.57 and 5 gives its ids."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.quickstart.corpora import vocabulary
from megatron_btx.common.errors import InputError
from megatron_btx.mixing import convert_hf
from megatron_btx.tokenizers.texts import texts
from megatron_btx.tokenizers.written_files import has_written_form, travelling_files
from tests.support.asked_tokenizers import Asked
from tests.support.hugging_face import OLDER, REPOSITORY
from tests.support.mixing import planned, rewrite
from tests.unit.mixing.folders import CONFIG, HIDDEN, llama_tensors, safetensors_bytes

ROWS = 800
WORDS = [f"word {i} of {i * 7 % 13} letters {chr(97 + i % 26)} Hello World don't the one two" for i in range(200)]
SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<tool>"]
TEXTS = texts(SPECIAL)
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Files = dict[str, Any]


def pieces(**settings: object) -> bytes:
    """A SentencePiece model of some 600 pieces."""
    import sentencepiece

    made = io.BytesIO()
    lines = iter([line for line in [*WORDS, *texts([])] if line.strip()])
    given = {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=made, minloglevel=2, hard_vocab_limit=False, **given
    )
    return made.getvalue()


def byte_pairs(prefix: bool = False) -> dict[str, Any]:
    """A byte-level tokenizer.json of 400 tokens, <|endoftext|> the last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(WORDS, trainer)
    made.add_special_tokens(["<|endoftext|>"])
    content = json.loads(made.to_str())
    content["model"]["vocab"]["<|endoftext|>"] = 399
    return content


def two_files(content: Mapping[str, Any]) -> Files:
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"])
    return {"vocab.json": content["model"]["vocab"], "merges.txt": f"#version: 0.2\n{merges}\n"}


def entry(number: int, token: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, "special": special, **flags}


def with_template(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that puts its token before every text."""
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_str(json.dumps(content))
    token = "<|endoftext|>"
    made.post_processor = processors.TemplateProcessing(f"{token} $A", special_tokens=[(token, 399)])
    return dict(json.loads(made.to_str()))


def model(folder: Path, files: Mapping[str, Any], rows: int = ROWS, **config: object) -> Path:
    """A pico Llama with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    held = llama_tensors()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        held[key] = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(held))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": rows} | config))
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else None
        text = content if isinstance(content, str) else json.dumps(content) if raw is None else ""
        (folder / name).write_bytes(raw if raw is not None else text.encode())
    return folder


def result(source: Path, target: Path, **request: object) -> tuple[Path, dict[str, Any]]:
    """All that a Hugging Face result of a source holds beside its numbers, and what its manifest says of it."""
    _, output = planned({"a": source}, target, "hf", method="copy", **request)
    target.mkdir(parents=True)
    for name, content in output.small_files.items():
        (target / name).write_bytes(content)
    return target, dict(output.tokenizer)


END = "<|endoftext|>"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
BACKEND = {"tokenizer_class": "TokenizersBackend"}
PIECES: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe-as-llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe-no-fallback": {"byte_fallback": False},
    "bpe-no-prefix-own": {"add_dummy_prefix": False, "user_defined_symbols": ["\n", "<tool>"]},
    "bpe-prefix-own": {"user_defined_symbols": ["\n", "<tool>"]},
    "bpe-folded": {"normalization_rule_name": "nmt_nfkc_cf"},
    "bpe-pad": {"pad_id": 3, "pad_piece": "[PAD]"},
    "unigram": {"model_type": "unigram"},
    "unigram-plain": {"model_type": "unigram", "add_dummy_prefix": False, "normalization_rule_name": "identity"},
    "unigram-own": {"model_type": "unigram", "user_defined_symbols": ["\n", "<tool>"], "byte_fallback": False},
}


def folders() -> dict[str, Files]:
    """Hugging Face folders in the forms that are met."""
    pairs, llama = byte_pairs(), pieces(normalization_rule_name="identity", remove_extra_whitespaces=False)
    added = pairs | {"added_tokens": [*pairs["added_tokens"], entry(400, "<|im_start|>"), entry(401, "<tool>", False)]}
    rowless = pairs | {"added_tokens": [*pairs["added_tokens"], *(entry(400 + n, f"<x{n}>") for n in range(500))]}
    begins = with_template(pairs) | {"added_tokens": [*rowless["added_tokens"], entry(900, "<first>")]}
    begins["post_processor"] = json.loads(
        json.dumps(begins["post_processor"]).replace(END, "<first>").replace("399", "900")
    )
    ends = {"bos_token": END, "eos_token": END, "unk_token": END}
    return {
        "model alone": {"tokenizer.model": llama, "tokenizer_config.json": LLAMA},
        "model without words": {"tokenizer.model": llama},
        "model and added": {
            "tokenizer.model": llama,
            "tokenizer_config.json": LLAMA,
            "added_tokens.json": {"<|im_start|>": 600, "<tool>": 601},
        },
        "plain": {"tokenizer.json": pairs, "tokenizer_config.json": FAST | ends},
        "no configuration": {"tokenizer.json": pairs},
        "class of 5": {"tokenizer.json": pairs, "tokenizer_config.json": BACKEND | ends},
        "lists of 5": {
            "tokenizer.json": added,
            "tokenizer_config.json": BACKEND | {"extra_special_tokens": ["<|im_start|>"]},
        },
        "gpt2 class": {"tokenizer.json": pairs, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"} | ends},
        "added in json": {"tokenizer.json": added, "tokenizer_config.json": FAST | ends},
        "added beside": {
            "tokenizer.json": pairs,
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"} | ends,
            "added_tokens.json": {"<|im_start|>": 400},
        },
        "decoder": {
            "tokenizer.json": pairs,
            "tokenizer_config.json": FAST | {"added_tokens_decoder": {"400": entry(400, "<|im_start|>")}},
        },
        "named only": {"tokenizer.json": pairs, "tokenizer_config.json": FAST | {"pad_token": "<|im_start|>"}},
        "map": {"tokenizer.json": pairs, "special_tokens_map.json": {"pad_token": "<|im_start|>"}},
        "two files": two_files(pairs) | {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"} | ends},
        "prefix": {
            "tokenizer.json": byte_pairs(prefix=True),
            "tokenizer_config.json": FAST | {"add_prefix_space": True},
        },
        "begins": {"tokenizer.json": with_template(pairs), "tokenizer_config.json": BACKEND},
        "begins without a row": {"tokenizer.json": begins, "tokenizer_config.json": BACKEND},
        "no rows": {"tokenizer.json": rowless, "tokenizer_config.json": FAST | {"pad_token": "<x499>"}},
    }  # fmt: skip


class Results:
    """All results, and what both versions of transformers make of them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folders: dict[str, Path] = {}
        self.expected: dict[str, Any] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.plain = place / "plain-megatron"
        source = str(model(place / "plain", {}))
        assert convert_hf.main(["import", "--hf-model", source, "--output", str(self.plain)]) == 0

    def megatron(self, name: str, files: Mapping[str, bytes], **arguments: object) -> Path:
        """A Megatron checkpoint whose tokenizer lies beside it."""
        folder = rewrite(self.plain, self.place / "runs" / name, arguments=arguments)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    def add(self, name: str, source: Path) -> None:
        self.folders[name], self.records[name] = result(source, self.place / "results" / name)


def sentencepiece_ids(content: bytes) -> list[list[int]]:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=content).encode(TEXTS)


def transformers_ids(folder: Path) -> list[list[list[int]]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [[tokenizer.encode(text, add_special_tokens=whole) for text in TEXTS] for whole in (False, True)]


FOLDERS = folders()
RUNS = [f"run {name}" for name in PIECES]
CASES = [*RUNS, "run gpt2", "run quickstart", *FOLDERS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    made = Results(tmp_path_factory.mktemp("tokenizers"))
    for name, settings in PIECES.items():
        content = pieces(**settings)
        run = made.megatron(name, {"t.model": content}, tokenizer_type="SentencePieceTokenizer",
                            tokenizer_model="/gone/t.model", tokenizer_sentencepiece_legacy=False)  # fmt: skip
        made.add(f"run {name}", run)
        made.expected[f"run {name}"] = [sentencepiece_ids(content)] * 2
    gpt2 = {name: content if isinstance(content, str) else json.dumps(content) for name, content in
            two_files(byte_pairs()).items()}  # fmt: skip
    run = made.megatron("gpt2", {name: content.encode() for name, content in gpt2.items()},
                        tokenizer_type="GPT2BPETokenizer", tokenizer_model=None,
                        vocab_file="/gone/vocab.json", merge_file="/gone/merges.txt")  # fmt: skip
    made.add("run gpt2", run)
    made.expected["run gpt2"] = transformers_ids(model(made.place / "gpt2", FOLDERS["two files"]))
    for name, files in FOLDERS.items():
        source = model(made.place / "folders" / name, files)
        made.add(name, source)
        made.expected[name] = transformers_ids(source)
    documents = [path.read_text()[:20_000] for path in sorted((REPOSITORY / "docs").glob("*.md"))[:4]]
    path = made.place / "quickstart.model"
    vocabulary.train(documents, path, 800)
    made.add("run quickstart", made.megatron("quickstart", {"t.model": path.read_bytes()}, tokenizer_model="t.model",
                                             tokenizer_type="SentencePieceTokenizer"))  # fmt: skip
    made.expected["run quickstart"] = [sentencepiece_ids(path.read_bytes())] * 2
    return made


@pytest.fixture(scope="module")
def questions(results: Results) -> dict[bool, Asked]:
    """Both versions are asked at once."""
    versions = (False, True) if OLDER.is_dir() else (False,)
    return {older: Asked(results.folders.values(), TEXTS, results.place, older) for older in versions}


@pytest.fixture(scope="module")
def newer(questions: dict[bool, Asked]) -> dict[str, Any]:
    return questions[False].answer()


@pytest.fixture(scope="module")
def older(questions: dict[bool, Asked]) -> dict[str, Any]:
    if not OLDER.is_dir():
        pytest.skip(f"{OLDER} does not exist; bash tools/environment.sh --tests installs it")
    answer = questions[True].answer()
    assert answer["version"].startswith("4.57")
    return answer


def check(results: Results, name: str, answer: Mapping[str, Any]) -> None:
    """The ids of the source's own tokenizer; equally probable pieces of Unigram in any order; rows that there are."""
    found = answer[str(results.folders[name])]["ids"]
    key: Callable[[list[int]], list[int]] = sorted if "unigram" in name else list
    for whole in (0, 1):
        for text, expected, ids in zip(TEXTS, results.expected[name][whole], found[whole], strict=True):
            if max(expected, default=0) < ROWS:
                assert key(ids) == key(expected), (text, whole)
            assert max(ids, default=0) < ROWS


@pytest.mark.parametrize("name", CASES)
def test_the_newer_transformers_gives_the_ids(name, results, newer):
    check(results, name, newer)


@pytest.mark.parametrize("name", CASES)
def test_the_older_transformers_gives_the_ids(name, results, older):
    check(results, name, older)


def test_special_tokens_are_named_everywhere(results, newer, older):
    """In the tokenizer's, the model's and the generation's configuration; a padding token without a row nowhere."""
    expected = {"run bpe": [1, 2, None], "run bpe-pad": [1, 2, 3], "plain": [399, 399, None], "no rows": [None] * 3}
    expected |= {"named only": [None, None, 400], "map": [None, None, 400], "run gpt2": [399, 399, None]}
    for name, numbers in expected.items():
        folder = results.folders[name]
        assert newer[str(folder)]["special"] == older[str(folder)]["special"] == numbers, name
        said = {
            f"{token}_token_id": n for token, n in zip(("bos", "eos", "pad"), numbers, strict=True) if n is not None
        }
        for file in ("config.json", "generation_config.json"):
            content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
            assert {
                key: content[key] for key in content if key in ("bos_token_id", "eos_token_id", "pad_token_id")
            } == said


def test_a_model_takes_what_a_tokenizer_returns(results, newer, older):
    """Transformers 4 has token_type_ids for the written class, which generate() refuses; classes pad on either side."""
    for name in CASES:
        folder = str(results.folders[name])
        if results.records[name]["form"].endswith("as it is"):
            continue  # the source's own files
        side = "left" if name in ("model alone", "model and added") else "right"
        for answer in (newer, older):
            assert answer[folder]["names"] == ["input_ids", "attention_mask"], name
            assert answer[folder]["side"] == side, name


def test_the_proof_is_recorded(results):
    """How many texts were compared with what, and that nothing differed."""
    for name in CASES:
        record = results.records[name]
        assert (
            (record["texts"] > 150 or "row" in name) and record["other_ids"] == 0 and "tokenizers 0." in record["said"]
        ), name
    assert "sentencepiece 0." in results.records["run bpe"]["read_by"]


def test_a_configurations_own_ids_win_where_they_have_rows(tmp_path):
    """Lists too; a number without a row is replaced."""
    files = FOLDERS["plain"] | {"generation_config.json": {"eos_token_id": [399, 7], "pad_token_id": -1, "top_k": 4}}
    source = model(tmp_path / "a", files, eos_token_id=5, bos_token_id=9999)
    folder, _ = result(source, tmp_path / "out")
    config, generation = (json.loads((folder / f).read_text()) for f in ("config.json", "generation_config.json"))
    assert config["eos_token_id"] == 5 and config["bos_token_id"] == 399 and "pad_token_id" not in config
    assert generation == {"eos_token_id": [399, 7], "top_k": 4, "bos_token_id": 399}


def test_special_tokens_are_kept_wherever_they_are_listed(tmp_path):
    """As a list of the configuration, as named ones of one's own, or in the older file alone."""
    added = FOLDERS["added in json"]["tokenizer.json"]
    for number, (config, files) in enumerate(
        [
            ({"additional_special_tokens": ["<|im_start|>"]}, {}),
            ({"extra_special_tokens": {"start": "<|im_start|>"}}, {}),
            ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>"]}}),
        ]
    ):
        files = {"tokenizer.json": added, "tokenizer_config.json": FAST | {"eos_token": END} | config} | files
        folder, _ = result(model(tmp_path / f"a{number}", files), tmp_path / f"out{number}")
        said = json.loads((folder / "tokenizer_config.json").read_text())
        assert said["additional_special_tokens"] == ["<|im_start|>"] and said["eos_token"] == END


def test_templates_and_added_tokens_reach_every_reader(results, tmp_path):
    """Those of transformers, and who goes by tokenizer.model and what stands beside it: llama.cpp's converter."""
    import transformers

    files = FOLDERS["model and added"] | {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"}
    (tmp_path / "a" / "additional_chat_templates").mkdir(parents=True)
    source = model(tmp_path / "a", files)
    for format_, within in (("hf", ""), ("megatron", "huggingface")):
        _, output = planned({"a": source}, tmp_path / "out", format_, method="copy")
        for name, content in output.small_files.items():
            (tmp_path / format_ / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / format_ / name).write_bytes(content)
        folder = tmp_path / format_ / within
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == {"default": "D", "tool_use": "T"}
        decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert decoder["600"]["content"] == "<|im_start|>" and decoder["601"]["content"] == "<tool>"
        own = {
            str(added["id"]): added["content"]
            for added in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        }
        assert {number: added["content"] for number, added in decoder.items()} == own
    assert has_written_form(travelling_files(tmp_path / "hf"), ROWS), "a second conversion would write other files"
    for name in ("plain", "run bpe", "added in json"):  # no other reader, or nothing that it lacks
        assert "added_tokens_decoder" not in json.loads((results.folders[name] / "tokenizer_config.json").read_text())


# --- refusals -------------------------------------------------------------------------------------------------


def test_other_ids_are_refused_and_shown(results, tmp_path, monkeypatch):
    """The first text, both lists, how many; with the flag it is written, and the record says so."""
    from megatron_btx.tokenizers import sentencepiece as sentencepiece_tokenizer

    monkeypatch.setattr(sentencepiece_tokenizer, "_normaliser", lambda *given: None)
    source = results.place / "runs" / "bpe"
    with pytest.raises(InputError) as refused:
        result(source, tmp_path / "out")
    message = str(refused.value)
    assert "texts get other ids, the first is ' '" in message and "in the source's own" in message
    assert "--allow-other-ids" in message and "\n" not in message
    _, record = result(source, tmp_path / "allowed", allow_other_ids=True)
    assert record["other_ids"] > 50 and "--allow-other-ids was given" in record["said"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TikTokenizer", "a TikTokenizer"),
        ("BertWordPieceCase", "a BertWordPieceCase"),
        ("GPT2BPETokenizer", "merge_file"),
    ],
)
def test_kinds_without_a_form_are_refused(kind, expected, results, tmp_path):
    run = results.megatron(
        f"kind-{kind}", {"t.json": b"[]"}, tokenizer_type=kind, tokenizer_model=None, vocab_file="/gone/t.json"
    )
    with pytest.raises(InputError, match=expected) as refused:
        result(run, tmp_path / "out")
    assert "--allow-other-ids" in str(refused.value)
    folder, record = result(run, tmp_path / "allowed", allow_other_ids=True)
    assert not (folder / "tokenizer.json").exists() and "not proved" in record["said"]


UNREADABLE: dict[str, Files] = {
    "vocabulary alone": {"vocab.json": {"a": 0, "b": 1}},
    "half a json": {"tokenizer.json": {"model": {"vocab": {"a": 0}}}},
    "words alone": {"tokenizer.json": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}},
    "tiktoken": {"x.tiktoken": "YQ== 0\nYg== 1\n"},
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_folders_that_transformers_cannot_read_are_refused(case, tmp_path):
    """Also where a class makes a tokenizer of nothing; the flag carries the files as they are."""
    files = UNREADABLE[case]
    source = model(tmp_path / "a", files)
    with pytest.raises(InputError, match="--allow-other-ids"):
        result(source, tmp_path / "out")
    folder, record = result(source, tmp_path / "allowed", allow_other_ids=True)
    name = next(iter(files))
    assert (folder / name).read_bytes() == (source / name).read_bytes() and "not proved" in record["said"]
