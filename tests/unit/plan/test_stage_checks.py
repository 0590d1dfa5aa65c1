"""What a program would refuse after the stages before it were trained is refused when the recipe is read."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_btx import cli
from megatron_btx.common.errors import InputError
from megatron_btx.data import preprocess
from megatron_btx.data.tokenizers import TokenizerSettings
from megatron_btx.evaluation.program import add_evaluation_arguments
from megatron_btx.plan import fingerprint as identity
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Program
from megatron_btx.recipe.load import load_recipe
from megatron_btx.training import check_stages
from tests.support import pico

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"
WITHOUT_INPUTS = {"four-models", "four-models-slurm"}
"""Recipes of models that nobody has here."""

pytestmark = pytest.mark.usefixtures("in_quickstart_folder")


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """Megatron's parser with our flags, made once: its import takes some 10 s."""
    made = check_stages.megatron_parser()
    return add_evaluation_arguments(made)


def check(parser: ArgumentParser, recipe: str, *changes: str) -> None:
    stages = plan_stages(load_recipe(RECIPES / f"{recipe}.yaml", list(changes)))
    asked = {}
    for stage in stages:
        if stage.on_gpu and isinstance(stage.program, Program):
            asked[stage.name] = (stage.processes, list(stage.program.words))
    check_stages.check_stages(parser, asked)


@pytest.mark.parametrize("recipe", sorted({file.stem for file in RECIPES.glob("*.yaml")} - WITHOUT_INPUTS))
def test_the_examples_pass(parser, recipe):
    """Every stage of every example, but of the one whose models are given: its own test runs it."""
    check(parser, recipe)
    check(parser, recipe, "finetune.megatron.btx-freeze=[experts]", "finetune.megatron.btx-first-loss-bound=5.0")


def described(folder: Path, size: int) -> str:
    """The prefix of a dataset that the NullTokenizer of so many tokens made: 200 numbers in each of 40 documents."""
    lines = [" ".join(str((i * 977 + j * 31) % (size - 1)) for j in range(200)) for i in range(40)]
    file = folder / f"{size}.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    preprocess.preprocess(
        [str(file)], str(folder / str(size)), TokenizerSettings("NullTokenizer", None, size), quiet=True
    )
    return str(folder / f"{size}_text_document")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the run's tokenizer, and of another."""
    folder = tmp_path_factory.mktemp("datasets")
    return {"own": described(folder, pico.VOCABULARY), "foreign": described(folder, 5001)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--train-data-path foreign", "stage seed: --train-data-path .*token ids up to 4999, .* ends at 95 "),
        ("--train-data-path own --btx-valid-data a=foreign", "stage seed: --btx-valid-data a= .*token ids up to 4999"),
        ("--btx-eval-data a=foreign", "stage seed: --btx-eval-data a= .*token ids up to 4999"),
        ("--train-data-path own --eval-iters 3", "stage seed: --eval-iters 3: there is no validation data"),
        ("--data-path own --split 99,1", "stage seed: --data-path with --split 99,1: .* leaves none to validation"),
        ("--data-path own", "stage seed: --data-path with --split 969, 30, 1: .* leaves none to test"),
        ("--train-data-path 1 own 0 later", "stage seed: --train-data-path: a dataset has the weight 0"),
        ("--train-data-path /no/where", "stage seed: --train-data-path /no/where: .*does not exist"),
        ("--train-data-path 1 own 2 later --valid-data-path later", None),
        ("--data-path own --split 1,0,0", None),
        ("--btx-eval-data a=own b=later c=/texts/of.jsonl", None),
    ],
)
def test_datasets_are_checked_before_the_first_stage(words, said, parser, datasets):
    """Those that are there; a run's own, at relative paths, may have to be made by a stage before."""
    line = [part.partition("=") for part in words.split()]
    data = [
        "".join((name, sign, datasets.get(path, path))) if sign else datasets.get(name, name)
        for name, sign, path in line
    ]
    stages = {"seed": (1, [*pico.MODEL, *pico.TRAINING, "--train-iters", "2", *data])}
    if said is None:
        check_stages.check_stages(parser, stages)
        return
    with pytest.raises(InputError, match=said):
        check_stages.check_stages(parser, stages)


TENSOR = "evaluate.layout={processes: 2, tensor-model-parallel-size: 2}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["finetune.megatron.btx-freeze=[expertz]"], "stage finetune: --btx-freeze expertz: .*no such group"),
        (["finetune.megatron.btx-freeze=[mlp]"], "stage finetune: --btx-freeze mlp: 'mlp': this model has none"),
        (["finetune.megatron.btx-freeze=['all-but:']"], "stage finetune: --btx-freeze all-but:: ''"),
        (
            ["finetune.megatron.btx-freeze=[experts, router, attention, norms, embeddings, head]"],
            "stage finetune: .* freezes everything",
        ),
        (["seed.megatron.btx-freeze=[experts]"], "stage seed: --btx-freeze experts: .*this model has none"),
        (
            ["finetune.megatron.eod-mask-loss=true"],
            "stage finetune: --btx-first-loss-bound evaluate-experts/.* measured without --eod-mask-loss and this run",
        ),
        (["finetune.megatron.btx-lr-multiplier=expertz=2"], "stage finetune: --btx-lr-multiplier expertz=2"),
        (["finetune.megatron.btx-lr-multiplier=router=nan"], "stage finetune: .*expected GROUP=X with X above zero"),
        (
            ["mix.megatron.moe-expert-capacity-factor=1.5"],
            "stage finetune: --moe-expert-capacity-factor 1.5 with top-2",
        ),
        (["finetune.megatron.moe-expert-capacity-factor=1.5"], "stage finetune: --moe-expert-capacity-factor"),
        (["training.moe-expert-capacity-factor=1.5"], "stage finetune: --moe-expert-capacity-factor"),
        (
            ["mix.load-balancing=paper", "mix.megatron.moe-aux-loss-coeff=-1"],
            "stage finetune: --moe-aux-loss-coeff -1: expected 0",
        ),
        (["mix.load-balancing=paper", "mix.megatron.moe-router-load-balancing-type=sinkhorn"], "paper with .*sinkhorn"),
        (["mix.load-balancing=paper", "mix.megatron.moe-router-score-function=sigmoid"], "stage finetune: .*softmax"),
        (["finetune.megatron.btx-first-loss-bound=nan"], "stage finetune: --btx-first-loss-bound nan: expected a loss"),
        (["finetune=null", "baselines=null", TENSOR], "stage evaluate-moe: .*sequence-parallel"),
    ],
)
def test_nonsense_is_refused(changes, said, parser):
    """With the stage and the program's own sentence."""
    with pytest.raises(InputError, match=said):
        check(parser, "quickstart", *changes)


@pytest.mark.parametrize("change", ["btx-sample-min-temperature=2", "moe-router-fusion=true"])
def test_nonsense_of_sampled_top1_is_refused(change, parser):
    """What that method does not take."""
    with pytest.raises(InputError, match=f"stage finetune: --{change.partition('=')[0]}"):
        check(parser, "quickstart-sample-top1", f"finetune.megatron.{change}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("freeze=[expertz]", "--btx-freeze expertz"),
        ("megatron={btx-lr-multiplier: 'expertz=2'}", "--btx-lr-multiplier expertz=2"),
        ("megatron={btx-lr-multiplier: router=nan}", "--btx-lr-multiplier router=nan"),
        ("megatron={moe-expert-capacity-factor: 2}", "--moe-expert-capacity-factor 2 with soft routing"),
    ],
)
def test_a_variant_is_named_in_its_refusal(change, said, parser):
    """By its stage."""
    with pytest.raises(InputError, match=f"stage ablation-soft-s1: {said}"):
        check(parser, "ablation-tiny", f"ablation.variants.soft.{change}")


@pytest.mark.usefixtures("starts_warm")
def test_the_dry_run_refuses_it(tmp_path, capsys):
    """In one line, before anything is run."""
    file, output = str(RECIPES / "quickstart.yaml"), str(tmp_path / "run")
    change = "finetune.megatron.btx-freeze=[expertz]"
    assert cli.main(["run", file, "--dry-run", "--output", output, "--set", change]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {file}: stage finetune: --btx-freeze expertz: ")
    assert said.err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("starts_warm")
def test_megatrons_own_validation_is_asked_before_the_first_stage(tmp_path, capsys):
    """What its assertions would say at the start of a stage, hours after the stages before it."""
    file, output = str(RECIPES / "quickstart.yaml"), str(tmp_path / "run")
    change = "finetune.megatron.min-lr=1"
    assert cli.main(["run", file, "--dry-run", "--output", output, "--set", change]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: stage finetune: Megatron refuses these arguments: assert args.min_lr <= ")
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_every_flag_said_not_to_decide_is_one(parser):
    """A flag that is misspelt in the list would decide, and keep a run that did not change."""
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    assert not sorted(identity.NOT_DECIDING - known)
