"""What the command line may not say, and what it may: one line that names the flag, with the remedy."""

from __future__ import annotations

import argparse

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.engine.checks import check_arguments
from tests.support import pico

SAMPLE = "--moe-router-topk 1 --moe-router-pre-softmax --btx-sample-top1 "
SWITCH = "--moe-router-topk 1 --moe-router-pre-softmax "
PAPER = "--btx-load-balancing paper "
TYPE = "--moe-router-load-balancing-type "


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Megatron's own, with our flags."""
    from megatron_btx.training.check_stages import megatron_parser

    return megatron_parser()


def check(parser: argparse.ArgumentParser, flags: str, moe: bool = True) -> None:
    args = parser.parse_args([*pico.MODEL, *(pico.MOE if moe else []), *pico.TRAINING, *flags.split()])
    args.world_size = 8
    check_arguments(args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--btx-freeze expertz", "'expertz': there is no such group; this model has experts, router"),
        ("--btx-freeze mlp", "this model has none"),
        ("--btx-freeze all-but:router router", "freezes everything"),
        ("--btx-lr-multiplier router", "expected GROUP=X"),
        ("--moe-router-topk 5", "can take 1 to 4 experts"),
        ("--moe-router-topk 0", "can take 1 to 4 experts"),
        ("--moe-router-topk 1", "add --moe-router-pre-softmax"),
        ("--num-experts 1 --moe-router-topk 1", "add --moe-router-pre-softmax"),
        ("--moe-layer-freq [0,1]", "an entry for each"),
        ("--moe-layer-freq [0,0,0,0]", "a mixture in one layer or more of 4"),
        ("--moe-expert-capacity-factor 1.5", "top-2 routing, which drops no token"),
        ("--moe-router-topk 4 --moe-expert-capacity-factor 1.5", "soft routing, which drops no token"),
        (SAMPLE + "--moe-expert-capacity-factor 2", "sampled top-1 routing, which drops no token"),
        (SWITCH + "--moe-expert-capacity-factor 0", "expected above 0"),
        (SWITCH + "--moe-expert-capacity-factor nan", "expected above 0"),
        ("--moe-aux-loss-coeff -1", "--moe-aux-loss-coeff -1: expected 0 or more"),
        ("--moe-aux-loss-coeff nan", "--moe-aux-loss-coeff nan: expected 0 or more"),
        (f"--moe-router-topk 4 {TYPE} quantile_balancing", "has nothing to balance"),
        ("--btx-sample-top1", "--moe-router-topk 1 --moe-router-pre-softmax"),
        (SAMPLE + "--btx-sample-min-temperature 0", "above 0 and at most 1"),
        (SAMPLE + "--btx-sample-min-temperature 1.5", "above 0 and at most 1"),
        (SAMPLE + "--btx-sample-decay -1", "0 or more"),
        ("--btx-sample-decay 0.1", "without --btx-sample-top1"),
        ("--btx-sample-min-temperature 0.9", "without --btx-sample-top1"),
        (f"{SAMPLE} {TYPE} sinkhorn --moe-aux-loss-coeff 0", "chooses experts itself"),
        (SAMPLE + "--moe-input-jitter-eps 0.1", "the noise of a token"),
        (SAMPLE + "--dataloader-type cyclic", "the noise of a token"),
        (SAMPLE + "--mlp-chunks-for-training 2", "--mlp-chunks-for-training together with --btx-sample-top1"),
        (PAPER + "--mlp-chunks-for-training 2", "--mlp-chunks-for-training together with --btx-load-balancing paper"),
        (PAPER + "--moe-router-fusion", "--moe-router-fusion together with"),
        (PAPER + "--moe-aux-loss-coeff 0", "above 0 (the paper's is 0.01)"),
        (PAPER + f"{TYPE} aux_loss global_aux_loss --moe-aux-loss-coeff 0.01 0", "above 0 (the paper's is 0.01)"),
        (PAPER + f"{TYPE} seq_aux_loss", "seq_aux_loss"),
        (PAPER + "--moe-router-score-function sigmoid", "defined on the softmax"),
        ("--rampup-batch-size 4 4 100", "does nothing in Megatron 0.19; use --train-samples and --step-batch-size"),
        ("--train-iters 5 --step-batch-size-schedule 0:2", "the first batch size alone; give --train-samples"),
        ("--train-iters 5 --phase-transition-iterations 2", "in place of --train-iters"),
        ("--dataloader-type external", "--dataloader-type external: these programs train on indexed datasets alone"),
        ("--mock-data", "--mock-data: these programs train on indexed datasets alone"),
        ("--sft", "--sft: these programs train on indexed datasets alone"),
        ("--fim-data", "--fim-data: these programs train on indexed datasets alone"),
        ("--dataloader-inter-document-masking", "masking: belongs to a program of Megatron's repository"),
        ("--hybrid-context-parallel", "--hybrid-context-parallel: belongs to a program"),
        ("--perform-rl-step", "--perform-rl-step: belongs to a program"),
        ("--inprocess-restart", "--inprocess-restart: is put around Megatron's own scripts"),
        ("--enable-ft-package", "--enable-ft-package: needs the package nvidia-resiliency-ext"),
        ("--rerun-mode report_stats", "takes the word and does not know it"),
        (
            "--transformer-impl local --save-activations-interval 2",
            "interval: Megatron 0.19 looks for layers of Transf",
        ),
        ("--transformer-impl local --save-dgrads-interval 2", "--save-dgrads-interval: Megatron 0.19 looks for"),
        ("--full-validation", "add --multiple-validation-sets, or use --btx-valid-data"),
        ("--multiple-validation-sets", "without --full-validation; add that"),
        ("--optimizer sgd --save there", "--optimizer sgd: Megatron 0.19 cannot resume it"),
        ("--optimizer sgd --use-distributed-optimizer", "--optimizer sgd: Megatron 0.19 cannot resume it"),
        ("--optimizer muon", "--optimizer muon: needs the package emerging-optimizers"),
        ("--logits-save-dir there", "--logits-save-dir: needs a module that Megatron's wheel lacks"),
        ("--logits-load-dir there", "--logits-load-dir: needs a module that Megatron's wheel lacks"),
        ("--transformer-impl local --context-parallel-size 2", "--context-parallel-size: only Transformer Engine has"),
        ("--transformer-impl local --window-size (8,0)", "--window-size: only Transformer Engine has it here"),
        ("--transformer-impl local --softmax-type learnable", "--softmax-type: only Transformer Engine has"),
        ("--transformer-impl local --fp8-format hybrid", "--fp8-format: only Transformer Engine has it here"),
        ("--transformer-impl local --fp4-format e2m1", "--fp4-format: only Transformer Engine has it here"),
        ("--transformer-impl local --apply-layernorm-1p", "--apply-layernorm-1p: only Transformer Engine has it here"),
        ("--transformer-impl local --multi-latent-attention", "--multi-latent-attention: only Transformer Engine"),
        ("--moe-router-fusion", "--moe-router-fusion: Megatron 0.19 looks for"),
        ("--moe-token-dispatcher-type flex", "flex: needs the package deep_ep, which is not installed; use alltoall"),
        ("--use-precision-aware-optimizer", "needs an optimizer of Transformer Engine, which is not installed"),
        ("--optimizer-cuda-graph", "needs an optimizer of Transformer Engine, which is not installed"),
        ("--train-iters 5 --lr-warmup-iters 5", "warmup of 5 iters: give fewer than the 5 of the whole schedule"),
        ("--train-iters 5 --lr-decay-iters 3 --lr-warmup-fraction 1", "warmup of 3 iters: give fewer than the 3"),
        ("--train-samples 20 --lr-warmup-samples 32", "warmup of 32 samples: give fewer than the 20"),
        ("--train-iters 5 --lr-warmup-init 1", "--lr-warmup-init: is above --lr 0.01; give less"),
        ("--train-iters 5 --min-lr -1", "--min-lr: is below 0; give 0 or more"),
        ("--train-iters 5 --lr-decay-style WSD", "--lr-decay-style WSD: needs --lr-wsd-decay-iters, too"),
        ("--reset-attention-mask", "causal over the whole sequence"),
        ("--mtp-num-layers 1 --pipeline-model-parallel-size 2", "--mtp-num-layers 1 with --pipeline"),
        ("--tensor-model-parallel-size 2", "add --sequence-parallel"),
        ("--tensor-model-parallel-size 2 --padded-vocab-size 32001", "--pad-vocab-to-multiple-of 128"),
    ],
)
def test_refused(flags, said, parser):
    """Never a traceback, and never a run in which the flag means nothing."""
    with pytest.raises(InputError) as refusal:
        check(parser, flags)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        SAMPLE + "--btx-sample-decay 0.1 --btx-sample-min-temperature 1",
        SAMPLE + PAPER,
        SWITCH + "--moe-expert-capacity-factor 1.5",
        "--moe-expert-capacity-factor -1",
        "--moe-router-topk 4",
        f"--moe-router-topk 1 {TYPE} sinkhorn --moe-aux-loss-coeff 0",
        PAPER + f"{TYPE} aux_loss global_aux_loss --moe-aux-loss-coeff 0.01 0.02",
        "--moe-layer-freq [0,1,1,1]",
        "--btx-freeze all-but:router,norms --btx-lr-multiplier router=10",
        "--mtp-num-layers 1",
        "--optimizer sgd",
        "--full-validation --multiple-validation-sets",
        "--train-samples 20 --step-batch-size-schedule 0:2",
        "--train-iters 5 --lr-warmup-iters 4 --min-lr 1e-2",
        "--train-iters 5 --lr-decay-style WSD --lr-wsd-decay-iters 1",
        "--train-iters 5 --lr-warmup-iters 5 --skip-train",
    ],
)
def test_accepted(flags, parser):
    """What makes sense, Megatron's other words for it among them."""
    check(parser, flags)


@pytest.mark.parametrize("flags", ["--btx-sample-top1", "--btx-load-balancing paper", "--btx-freeze router"])
def test_dense_models_have_no_routers(flags, parser):
    """Routing flags of a dense model are a mistake, not a wish."""
    with pytest.raises(InputError, match="has no experts|has none"):
        check(parser, flags, moe=False)
