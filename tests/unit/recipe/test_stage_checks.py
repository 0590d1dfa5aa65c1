"""What a program would refuse after the stages before it were trained is refused when the recipe is read."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_btx import cli
from megatron_btx.errors import InputError
from megatron_btx.evaluate import add_evaluation_arguments
from megatron_btx.recipe import flags
from megatron_btx.recipe.planner import plan_stages
from megatron_btx.recipe.schema import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """Megatron's parser with our flags, made once: its import takes some 10 s."""
    made = flags._megatron_parser()
    return add_evaluation_arguments(made)


def check(parser: ArgumentParser, recipe: str, *changes: str) -> None:
    stages = plan_stages(load_recipe(RECIPES / f"{recipe}.yaml", list(changes))[0])
    asked = {stage.name: (stage.processes, flags.program_words(stage)) for stage in stages if stage.on_gpu}
    flags.check_stages(parser, asked)


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_the_examples_pass(parser, recipe):
    """Every stage of every example."""
    check(parser, recipe)
    check(parser, recipe, "finetune.megatron.btx-freeze=[experts]", "finetune.megatron.btx-first-loss-bound=5.0")


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


def test_the_dry_run_refuses_it(tmp_path, capsys):
    """In one line, before anything is run."""
    file, output = str(RECIPES / "quickstart.yaml"), str(tmp_path / "run")
    change = "finetune.megatron.btx-freeze=[expertz]"
    assert cli.main(["run", file, "--dry-run", "--output", output, "--set", change]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {file}: stage finetune: --btx-freeze expertz: ")
    assert said.err.count("\n") == 1 and not (tmp_path / "run").exists()
