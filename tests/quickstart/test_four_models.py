"""The recipe of four given models and four folders of text, every stage of it real, with models of pico size."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.recipe.from_checkpoint import read_models
from megatron_btx.runner.run_dir import read_evaluation
from tests.support import hugging_face, toys
from tests.support.runner import REPOSITORY

RECIPE = REPOSITORY / "examples" / "recipes" / "four-models.yaml"
NAMES = ("seed", "math", "code", "wiki")
SMALL = [
    *(f"training.{flag}" for flag in ("seq-length=32", "micro-batch-size=4", "global-batch-size=4")),
    *("data.split={train: 0.8, valid: 0.1, test: 0.1}", "finetune.tokens=2_560", "finetune.megatron.lr=1.0e-3"),
    f"evaluate.tokens={hugging_face.EVAL_TOKENS}",
]
pytestmark = pytest.mark.timeout(900)  # sixteen stages; the machine may be shared


def make_tokenizer(folder: Path) -> Any:
    """Save a tokenizer of bytes as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    fast = hugging_face.quiet().PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def make_seed(tokenizer: Any, texts: list[str]) -> torch.nn.Module:
    """A pico Llama, trained until it knows that most tokens never stand in the texts."""
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}
    model = hugging_face.make_model(hugging_face.MODELS["llama"] | {"num_key_value_heads": 2} | sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2 if parameter.dim() > 1 else 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids_T = torch.tensor(tokenizer("</s>".join(texts))["input_ids"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        starts = torch.randint(len(ids_T) - 64, (8,), generator=generator).tolist()
        batch_BS = torch.stack([ids_T[start : start + 64] for start in starts])
        optimizer.zero_grad()
        model(batch_BS, labels=batch_BS).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def run(warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run; models/ and texts/ lie beside it, as the recipe names them.

    Its stages are started warm: from the cold they are in test_quickstart.py.
    """
    place = tmp_path_factory.mktemp("four")
    texts = []
    for number, name in enumerate(NAMES):
        folder = place / "texts" / {"seed": "general"}.get(name, name)
        folder.mkdir(parents=True)
        chooser = random.Random(number)
        documents = [" ".join(chooser.choices([f"{name}{n}" for n in range(20)], k=40)) for _ in range(120)]
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        texts += documents
    random.Random(0).shuffle(texts)
    seed = make_seed(make_tokenizer(place / "models" / "seed"), texts)
    for number, name in enumerate(NAMES):
        model, generator = copy.deepcopy(seed), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.003 * min(number, 1))
        hugging_face.save(model, place / "models" / name)
        make_tokenizer(place / "models" / name)
    words = ("run", str(RECIPE), "--output", "run", "--cpu", "--set", *SMALL)
    btx(place, *words, BTX_PYTHON=str(warm_python))
    return place / "run"


def btx(place: Path, *words: str, **variables: str) -> str:
    """Call btx in a folder; what it says."""
    program = str(Path(sys.executable).with_name("btx"))
    done = subprocess.run(
        [program, *words], cwd=place, env={**os.environ, **variables}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_export_is_the_mixture_that_was_evaluated(run: Path) -> None:
    """transformers computes on the exported folder what Megatron computed on the finetuned checkpoint."""
    model = hugging_face.loaded(run / "export" / "model")
    assert model.config.num_local_experts == 4
    losses = read_evaluation(run / "evaluate-moe" / "evaluation.json").models["btx"].losses
    for domain in ("general", "math", "code", "wiki"):
        computed = hugging_face.loss_in_transformers(model, run / "data" / f"{domain}.test")
        assert computed == pytest.approx(losses[domain], abs=1e-5)  # sums in another order


def test_its_tokenizer_is_the_seeds(run: Path) -> None:
    transformers = hugging_face.quiet()
    folders = (run.parent / "models" / "seed", run / "export" / "model")
    first, second = (transformers.AutoTokenizer.from_pretrained(folder) for folder in folders)
    assert first("math1 and code2 </s>")["input_ids"] == second("math1 and code2 </s>")["input_ids"]


def test_finetuning_helped_and_the_report_says_so(run: Path) -> None:
    said = btx(run.parent, "report", "run")
    assert "btx" in said and "average" in said
    means = {}
    for stage in ("evaluate-moe", "evaluate-experts"):
        for name, found in read_evaluation(run / stage / "evaluation.json").models.items():
            means[name] = sum(found.losses.values())
    assert means["btx"] < means["mix"] and means["btx"] < means["seed"]


def test_nothing_is_left_to_do(run: Path) -> None:
    said = btx(run.parent, "run", str(RECIPE), "--output", "run", "--cpu", "--set", *SMALL)
    assert "running" not in said and "import-math: skipped" in said and "export: skipped" in said


def test_a_model_folder_and_one_iteration_say_what_they_are(run: Path) -> None:
    """The flags that the recipe left out, of both forms that Megatron cannot start from."""
    (iteration,) = (run / "finetune" / "checkpoint").glob("iter_*")
    found = read_models({"seed": run.parent / "models" / "seed", "mixture": iteration})
    seed, mixture = found["seed"], found["mixture"]
    assert seed.model["num-layers"] == "3" and seed.model["num-query-groups"] == "2" and seed.model["swiglu"] is True
    assert "num-experts" not in seed.model and mixture.model["num-experts"] == "4"
    assert mixture.tokenizer == seed.tokenizer
    assert seed.tokenizer == {
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": str(run.parent / "models" / "seed"),
    }


TOYS = {
    "include": str(RECIPE),
    "data": {"domains": None, "split": None, "workers": None, "seed": None},
    "experts": None,
    "finetune": None,
    "export": None,
    "mix": {"experts": ["math", "code", "seed"], "method": "trim", "density": 0.3},
    "baselines": {"average": None, "average-finetuned": False, "denser": True},
    "domains": ["math", "code"],
}


def test_somebody_elses_method_baseline_and_claim_reach_a_run_and_its_report(run: Path) -> None:
    """Of an installed package: in the recipe, the plan, the programs that the run starts, verification, the report."""
    place = run.parent
    toys.install(place / "packages")
    (place / "toys.yaml").write_text(json.dumps(TOYS))
    changes = [word for word in SMALL if not word.startswith(("data.", "finetune."))]
    for name in ("math", "code"):
        changes.append(f"experts.{name}.from={run / f'import-{name}' / 'checkpoint'}")
        changes += [f"data.domains.{name}.{split}=[{run / 'data' / name}.{split}]" for split in ("train", "test")]
    changes.append(f"seed.from={run / 'import-seed' / 'checkpoint'}")
    words = ["run", "toys.yaml", "--output", "toys", "--cpu", "--set", *changes]
    said = btx(place, *words, PYTHONPATH=f"{place / 'packages'}{os.pathsep}{REPOSITORY}")
    assert "Fewer differences are better" in said
    mixing = (place / "toys" / "mix" / "command.sh").read_text()
    assert "--method=trim" in mixing and "--verify" in mixing
    losses = read_evaluation(place / "toys" / "evaluate-moe" / "evaluation.json").models
    assert losses["mix"].losses != losses["denser"].losses
    facts = json.loads((place / "toys" / "report" / "results.json").read_text())["facts"]
    fact = next(fact for fact in facts if fact["name"] == "less_is_more")
    assert set(fact["numbers"]["denser_mix"]) == {"math", "code"} and fact["holds"] is not None
