"""The files of a run and their forms, written and read here only.

    RUN/plan.json  recipe.yaml  .lock  data/corpora.json
    RUN/STAGE/config.yaml  command.sh  log.txt  manifest.json  metrics.jsonl  evaluation.json  checkpoint/

One rule for what cannot be read. A file that is not there is None or empty. A number that is none is None. A line of
metrics.jsonl that is no JSON object with an iteration is passed over: a kill tears the last one, and the resumed run
writes it again behind. Anything else that is broken is an InputError, which names the file.

Nothing here needs torch or Megatron.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.ground import manifest as manifests
from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import read_json_object

PLAN_FILE = "plan.json"
"""Of a run: its stages with their steps, tokens and fingerprints, in order."""
RECIPE_FILE = "recipe.yaml"
"""Of a run: the recipe with all that was changed in it."""
LOCK_FILE = ".lock"
CONFIG_FILE = "config.yaml"
SCRIPT_FILE = "command.sh"
LOG_FILE = "log.txt"
MANIFEST_FILE = manifests.FILE_NAME
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
CORPORA_FILE = "corpora.json"
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
MODELS_BEFORE_EXPERTS = (SEED_MODEL,)
MODELS_AFTER_EXPERTS = (AVERAGE_MODEL, MIX_MODEL, BTX_MODEL, DENSE_MODEL)
"""Models of an evaluation in the order of a report; the experts stand between the two."""
TRAIN_SPLIT, VALID_SPLIT, TEST_SPLIT = "train", "valid", "test"
SPLITS = (TRAIN_SPLIT, VALID_SPLIT, TEST_SPLIT)

LARGEST_COUNT = 2**53
"""Whole numbers above it are no counts of anything; floating point does not hold them exactly either."""
_SET_ASIDE = re.compile(r".+\.\d{8}-\d{6}(-\d+)?")
_TAIL_BYTES, _TAIL_BYTES_AT_MOST = 2**15, 2**26
_TAIL_GROWTH = 8


def read_number(value: object) -> float | None:
    """``value`` where it is a number that can be reckoned with; it may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and value.bit_length() >= 64:
        return None
    return value


def read_count(value: object) -> int | None:
    """``value`` where it is a whole number of things, from 0 to 2^53."""
    if type(value) is not int or not 0 <= value < LARGEST_COUNT:
        return None
    return value


def _read_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return None


def _read_mapping(value: object) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    return None


def _read_parents(value: object) -> dict[str, str | None]:
    """Parents with their fingerprints; a list of names, as earlier versions wrote, has none."""
    if isinstance(value, list):
        return {str(name): None for name in value}
    if not isinstance(value, dict):
        return {}
    return {str(name): _read_text(fingerprint) for name, fingerprint in value.items()}


Number = Annotated[float | None, BeforeValidator(read_number)]
Count = Annotated[int | None, BeforeValidator(read_count)]
Text = Annotated[str | None, BeforeValidator(_read_text)]
Settings = Annotated[dict[str, Any] | None, BeforeValidator(_read_mapping)]
Parents = Annotated[dict[str, str | None], BeforeValidator(_read_parents)]


class _Record(BaseModel):
    """What a file of a run holds. Whatever else it holds is kept: a later version may have written it."""

    model_config = ConfigDict(extra="allow", frozen=True)


class StageManifest(_Record):
    """A stage's manifest.json: what it was made from, by which versions, at what cost."""

    stage: Text = None
    status: Text = None
    """running (also after a kill), finished, failed, stopped, or made by hand."""
    fingerprint: Text = None
    """Hash of the settings that decide the result, and of the parents' fingerprints."""
    parents: Parents = Field(default_factory=dict)
    """Stage -> its fingerprint when this one was made; None where an earlier version wrote none."""
    settings: Settings = None
    """The settings that decide the result; None where an earlier version wrote none."""
    steps: Count = None
    tokens: Count = None
    flops: Number = None
    seconds: Number = None
    """Of all its starts."""
    starts: Count = None
    rerun: Settings = None
    """The --rerun that began it: its stages and its number."""

    @property
    def is_finished(self) -> bool:
        """Whether the stage came to its end."""
        return self.status == "finished"

    def identity(self) -> dict[str, Any]:
        """What says which stage it is: its fingerprint and its parents', or their names where it has none."""
        parents: dict[str, str | None] | list[str] = self.parents
        if None in self.parents.values():
            parents = list(self.parents)
        return {"fingerprint": self.fingerprint, "parents": parents}

    @property
    def rerun_number(self) -> int:
        """Which of the run's reruns began the stage, from 1; 0 when none did."""
        if self.rerun is None:
            return 0
        return read_count(self.rerun.get("number")) or 0


class PlannedStage(_Record):
    """One entry of plan.json."""

    stage: str
    steps: Count = None
    tokens: Count = None
    fingerprint: Text = None
    """None for a stage that only shows what others made."""


class MetricsLine(_Record):
    """One line of metrics.jsonl: what was logged after one step. Metrics by other names are in ``model_extra``."""

    iteration: int
    time: Number = None
    """Seconds since 1970."""
    loss: Number = Field(default=None, alias="lm loss")
    """Training loss, nats per token; may be NaN."""

    def numbers(self) -> Iterator[tuple[str, float]]:
        """(name, value) of every other metric that is a number."""
        for name, value in (self.model_extra or {}).items():
            found = read_number(value)
            if found is not None:
                yield name, found


class ModelEvaluation(_Record):
    """What evaluation.json says of one model."""

    losses: dict[str, float]
    """Domain -> loss, nats per token; may be NaN."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """Domain -> evaluated tokens."""
    parameters: Count = None
    active_parameters: Count = None
    """Parameters that work on one token."""
    routing: dict[str, list[list[float]]] | None = None
    """Domain -> layer -> share of the routed (token, expert) pairs per expert; a layer's shares sum to one."""


class Evaluation(_Record):
    """An evaluation.json."""

    models: dict[str, ModelEvaluation]
    experts: list[str] | None = None
    """Names of the experts, in the order of the routing's shares; None where no mixture was evaluated."""
    eod_mask_loss: bool | None = None
    """Whether the loss of the tokens behind documents was left out; None where an earlier version wrote it."""


def is_set_aside(name: str) -> bool:
    """Whether ``name`` is that of an earlier stage's folder, kept beside the one that took its place."""
    return _SET_ASIDE.fullmatch(name) is not None


def find_free_name(directory: Path) -> Path:
    """A free name beside ``directory``, to keep it under: its own with the time."""
    stem = f"{directory.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    path = directory.with_name(stem)
    number = 2
    while os.path.lexists(path):
        path = directory.with_name(f"{stem}-{number}")
        number += 1
    return path


def read_plan(run: Path) -> list[PlannedStage] | None:
    """The plan of the run directory ``run``; None when what lies there is none."""
    path = run / PLAN_FILE
    if not path.is_file():  # reading a pipe would wait forever
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, list):
        return None
    plan: list[PlannedStage] = []
    for entry in content:
        if not _is_planned(entry):
            return None
        plan.append(PlannedStage.model_validate(entry))
    return plan


def _is_planned(entry: object) -> bool:
    """Whether it is an entry of a plan: a stage, with its steps and tokens where it trains."""
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        return False
    for key in ("steps", "tokens"):
        count = entry.get(key)
        if count is not None and (type(count) is not int or count.bit_length() >= 64):
            return False
    return True


def read_stage_manifest(directory: Path) -> StageManifest | None:
    """The manifest in a stage's folder; None when there is none. Raises InputError when it is not a JSON object."""
    content = manifests.read_manifest(directory)
    if content is None:
        return None
    return StageManifest.model_validate(content)


def read_checkpointed_iteration(directory: Path) -> int:
    """The iteration of the last checkpoint in a stage's folder; 0 when there is none."""
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():  # reading a pipe would wait forever
        return 0
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text.isascii() and text.isdecimal() and len(text) < 16:
        return int(text)
    return 0


def read_metrics(path: Path) -> list[MetricsLine]:
    """All lines of a metrics.jsonl, in the file's order; of two for one iteration the later one counts.

    Raises:
        InputError: it has lines, and none of them can be read.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = parse_metrics(text)
    if text.strip() and not lines:
        written = len(text.strip().splitlines())
        raise InputError(f"{path}: none of its {written} lines is a JSON object with an iteration; remove it, rerun")
    return lines


def read_last_metrics(path: Path, lines: int) -> list[MetricsLine]:
    """At least the last ``lines`` of a metrics.jsonl, or all where it has fewer; what cannot be read is left out.

    The window grows until it holds them: a line of a wide mixture has 20 KB and more. A first line that the window
    cuts is a torn one.
    """
    if not path.is_file():  # opening a pipe would wait forever
        return []
    window = _TAIL_BYTES
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            while True:
                stream.seek(max(0, size - window))
                found = parse_metrics(stream.read().decode("utf-8", "replace"))
                if len(found) >= lines or window >= size or window > _TAIL_BYTES_AT_MOST:
                    return found
                window *= _TAIL_GROWTH
    except OSError:
        return []


def parse_metrics(text: str) -> list[MetricsLine]:
    """The readable lines of ``text``; see the module for those that are passed over."""
    found: list[MetricsLine] = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and read_count(content.get("iteration")) is not None:
            found.append(MetricsLine.model_validate(content))
    return found


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in ``path``.

    Raises:
        InputError: it is not in the form of an evaluation.
    """
    content = read_json_object(path, "run the stage that writes it again")
    if not isinstance(content.get("models"), dict):
        raise InputError(f"{path}: no mapping 'models'; expected an evaluation.json; evaluate the run again")
    models = {str(name): _read_model(path, str(name), entry) for name, entry in content["models"].items()}
    experts = [str(expert) for expert in content.get("experts") or ()] or None
    masked = content.get("eod_mask_loss")
    if not isinstance(masked, bool):
        masked = None
    return Evaluation(models=models, experts=experts, eod_mask_loss=masked)


def _read_model(path: Path, name: str, entry: object) -> ModelEvaluation:
    try:
        return ModelEvaluation.model_validate(entry)
    except (ValidationError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(
            f"{path}: model {name!r} is not in the form of an evaluation ({reason}); evaluate the run again"
        ) from None


def own_manifest(directory: Path, name: str) -> StageManifest | None:
    """The manifest of stage ``name`` in ``directory``; None for an empty folder or none.

    Raises:
        InputError: something else lies there, which we did not make and will not touch.
    """
    if not directory.is_dir():
        if os.path.lexists(directory):
            raise InputError(f"{directory}: is no folder; a stage of this name needs one there: move it away")
        return None
    content = manifests.read_manifest(directory)
    if content is not None and content.get("stage") == name and "status" in content:
        return StageManifest.model_validate(content)
    if content is None and all(manifests.is_unwritten(path) for path in directory.iterdir()):
        return None
    found = "no manifest.json"
    if content is not None:
        found = f"a manifest.json that is not of a stage {name}"
    raise InputError(f"{directory}: not made by btx run ({found}); move it away, or give another --output")


def check_run(run: Path) -> None:
    """Refuse a run directory in which files of a run's names lie that no run wrote, because they would be replaced.

    Raises:
        InputError: the file.
    """
    if os.path.lexists(run) and not run.is_dir():
        raise InputError(f"{run}: is no folder; give another --output")
    if (run / LOCK_FILE).exists() or read_plan(run) is not None:
        return
    for path in (run / PLAN_FILE, run / RECIPE_FILE):
        if os.path.lexists(path):
            raise InputError(f"{path}: not written by btx run, which would replace it; give another --output")
