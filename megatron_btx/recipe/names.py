"""Names that users see in a run's directory: its files, stages, models and splits. Each is written here alone."""

from __future__ import annotations

import re

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.common.manifest import FILE_NAME

PLAN_FILE = "plan.json"
"""Of a run: its stages with their steps, tokens and fingerprints, in order."""
MODELS_FILE = "models.json"
"""Of a run: its table of models, a mapping for each row."""
RECIPE_FILE = "recipe.yaml"
"""Of a run: the recipe with all that was changed in it."""
LOCK_FILE = ".lock"
CONFIG_FILE = "config.yaml"
SCRIPT_FILE = "command.sh"
LOG_FILE = "log.txt"
MANIFEST_FILE = FILE_NAME
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
DATASETS_FILE = "datasets.json"
"""Of the stage that makes datasets of texts: what is in them."""
CHECKPOINT_FOLDER = "checkpoint"
TRACKER_FILE = f"{CHECKPOINT_FOLDER}/{TRACKER}"
"""Of a stage that trains: the iteration of its last checkpoint."""
DATA_CACHE_FOLDER = "data-cache"
REPORT_FILE = "report.md"
ABLATION_REPORT_FILE = "ablation.md"
STAGE_RECORDS = (CONFIG_FILE, SCRIPT_FILE, LOG_FILE, MANIFEST_FILE)
"""What the runner writes into every stage's folder."""

DATA_STAGE, SEED_STAGE, MIX_STAGE, FINETUNE_STAGE = "data", "seed", "mix", "finetune"
DENSE_DOMAINS_STAGE, DENSE_STAGE, AVERAGE_STAGE, REPORT_STAGE = "dense-domains", "dense", "average", "report"
EXPORT_STAGE, EXPORTED_FOLDER = "export", "model"
EVALUATION_PREFIX = "evaluate-"
EVALUATE_EXPERTS_STAGE = "evaluate-experts"
"""The stage that evaluates the seed and the experts; its losses bound the mixture's first."""
EXPERT_PREFIX = "expert-"
"""Begins the name of an expert's stage, and of its model in an evaluation."""
IMPORT_PREFIX = "import-"
"""Begins the name of the stage that imports a given model."""
SEED_MODEL, AVERAGE_MODEL, MIX_MODEL, BTX_MODEL, DENSE_MODEL = "seed", "average", "mix", "btx", "dense"
GENERALIST = SEED_MODEL
"""The seed's name among the experts of a mix."""
TRAIN_SPLIT, VALID_SPLIT = "train", "valid"

_SET_ASIDE = re.compile(r".+\.\d{8}-\d{6}(-\d+)?")


def is_set_aside(name: str) -> bool:
    """Whether ``name`` is that of an earlier stage's folder, kept beside the one that took its place."""
    return _SET_ASIDE.fullmatch(name) is not None


def place_of(stage: str) -> str:
    """Where a recipe says what a stage does."""
    name = stage.removeprefix(IMPORT_PREFIX)
    if stage.startswith((f"{MIX_STAGE}-s", AVERAGE_STAGE)):
        return MIX_STAGE
    if stage.startswith(EXPERT_PREFIX):
        return f"experts.{stage.removeprefix(EXPERT_PREFIX)}"
    if name != stage and name not in (SEED_STAGE, MIX_STAGE, FINETUNE_STAGE):
        return f"experts.{name}"
    return name
