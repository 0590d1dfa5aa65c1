"""The files of a run and their forms, written and read here only.

    RUN/plan.json  recipe.yaml  models.json  .lock  data/datasets.json
    RUN/STAGE/config.yaml  command.sh  log.txt  manifest.json  metrics.jsonl  evaluation.json  checkpoint/

One rule for what cannot be read. A file that is not there is None or empty. A number that is none is None. A line of
metrics.jsonl that is no JSON object with an iteration is passed over: a kill tears the last one, and the resumed run
writes it again behind. Anything else that is broken is an InputError, which names the file. What the files hold is in
schemas.py.

Nothing here needs torch or Megatron.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_btx.common import manifest as manifests
from megatron_btx.common.errors import InputError
from megatron_btx.common.files import parse_json, read_json, read_json_object
from megatron_btx.recipe.names import LOCK_FILE, MODELS_FILE, PLAN_FILE, RECIPE_FILE, TRACKER_FILE
from megatron_btx.runner.schemas import (
    LOSS,
    Evaluation,
    MetricsLine,
    ModelEvaluation,
    ModelRow,
    PlannedStage,
    Score,
    StageManifest,
    read_count,
)

_END_BYTES = 1 << 22
"""Of a file: more than 20 lines of metrics, of which a wide mixture writes 20 KB each."""


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
    try:
        return TypeAdapter(list[PlannedStage]).validate_python(read_json(run / PLAN_FILE, "btx run writes it again"))
    except (OSError, ValueError, InputError):
        return None


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping that a run wrote as YAML; empty where there is none. Raises InputError when it is broken."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken YAML ({error}); btx run writes it again") from error
    if not isinstance(content, dict):
        return {}
    return content


def read_stage_manifest(directory: Path) -> StageManifest:
    """The manifest in a stage's folder, empty where there is none. Raises InputError when it is not a JSON object."""
    return StageManifest.model_validate(manifests.read_manifest(directory) or {})


def read_checkpointed_iteration(directory: Path) -> int:
    """The iteration of the last checkpoint in a stage's folder; 0 when there is none."""
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():  # reading a pipe would wait forever
        return 0
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    return int(text) if text.isdecimal() else 0


def read_metrics(path: Path) -> list[MetricsLine]:
    """All lines of a metrics.jsonl, in the file's order; of two for one iteration the later one counts.

    Raises:
        InputError: it has lines, and none of them can be read.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = parse_metrics(text.splitlines())
    if text.strip() and not lines:
        written = len(text.strip().splitlines())
        raise InputError(f"{path}: none of its {written} lines is a JSON object with an iteration; remove it, rerun")
    return lines


def read_end(file: Path, offset: int = 0) -> str:
    """What was written into a file behind ``offset``: of much the end, and nothing where it is gone or no file."""
    if not file.is_file():  # opening a pipe would wait forever
        return ""
    with file.open("rb") as stream:
        stream.seek(max(offset, os.fstat(stream.fileno()).st_size - _END_BYTES))
        return stream.read().decode("utf-8", "replace")


def parse_metrics(lines: Iterable[str]) -> list[MetricsLine]:
    """Those of ``lines`` that can be read; see the module for those that are passed over.

    A line takes back those of later steps before it: of a start whose steps were lost, and are taken again.
    """
    found: list[MetricsLine] = []
    for line in lines:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict) and read_count(content.get("iteration")) is not None:
            if content.get("skipped"):
                content.pop("lm loss", None)
            while found and found[-1].iteration > content["iteration"]:
                found.pop()
            found.append(MetricsLine.model_validate(content))
    return found


def read_model_table(run: Path) -> list[ModelRow] | None:
    """The table of models of the run directory ``run``; None where there is none. Raises InputError when broken."""
    path = run / MODELS_FILE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(list[ModelRow]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: is no table of models ({say_first(error)}); btx run writes it again") from None


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in ``path``, of this version or an earlier one. Raises InputError for another form."""
    content = read_json_object(path, "run the stage that writes it again")
    if not isinstance(content.get("models"), dict):
        raise InputError(f"{path}: no mapping 'models'; expected an evaluation.json; evaluate the run again")
    models = {}
    for name, entry in content["models"].items():
        models[str(name)] = _read_part(ModelEvaluation, entry, f"{path}: model {str(name)!r}")
    scores = []
    for name, model in models.items():
        for domain, loss in model.losses.items():
            scores.append(make_loss(name, domain, loss, model.tokens.get(domain)))
    for number, entry in enumerate(content.get("scores") or ()):
        scores.append(_read_part(Score, entry, f"{path}: score {number}"))
    for score in scores:
        model = models.setdefault(score.model, ModelEvaluation())
        if score.measure == LOSS:
            model.losses[score.data] = score.value
            if score.count is not None:
                model.tokens[score.data] = score.count
    experts = [str(expert) for expert in content.get("experts") or ()] or None
    return Evaluation(scores=scores, models=models, experts=experts, eod_mask_loss=content.get("eod_mask_loss"))


def make_loss(model: str, domain: str, loss: float, tokens: int | None, stderr: float | None = None) -> Score:
    """The score of a mean loss over ``tokens``."""
    return Score(model=model, measure=LOSS, data=domain, value=loss, stderr=stderr, count=tokens, unit="nats/token")


def _read_part[Part: BaseModel](form: type[Part], entry: object, where: str) -> Part:
    try:
        return form.model_validate(entry)
    except ValidationError as error:
        raise InputError(f"{where} is not in the form of an evaluation ({say_first(error)}); evaluate again") from None


def say_first(error: ValidationError) -> str:
    """Where a record's first fault is, and what."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def own_manifest(directory: Path, name: str) -> StageManifest:
    """The manifest of stage ``name`` in ``directory``; one without a ``stage`` for an empty folder or none.

    Raises:
        InputError: something else lies there, which we did not make and will not touch.
    """
    if not os.path.lexists(directory):
        return StageManifest()
    if not directory.is_dir():
        raise InputError(f"{directory}: is no folder; a stage of this name needs one there: move it away")
    content = manifests.read_manifest(directory)
    if content is None and all(manifests.is_unwritten(path) for path in directory.iterdir()):
        return StageManifest()
    found = "no manifest.json"
    if content is not None:
        if content.get("stage") == name and "status" in content:
            return StageManifest.model_validate(content)
        found = f"a manifest.json that is not of a stage {name}"
    raise InputError(f"{directory}: not made by btx run ({found}); move it away, or give another --output")


def check_run(run: Path) -> None:
    """Refuse a run directory in which files of a run's names lie that no run wrote: they would be replaced."""
    if os.path.lexists(run) and not run.is_dir():
        raise InputError(f"{run}: is no folder; give another --output")
    if (run / LOCK_FILE).exists() or read_plan(run) is not None:
        return
    for path in (run / PLAN_FILE, run / RECIPE_FILE):
        if os.path.lexists(path):
            raise InputError(f"{path}: not written by btx run, which would replace it; give another --output")


@contextlib.contextmanager
def lock_run(run: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the run directory for a runner, or by LOCK_SH for those that submit. Raises InputError when others do."""
    with (run / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run}: another btx run, a job or a command.sh is at work here, or a btx submit; wait, or give "
                "another --output"
            ) from None
        except OSError:  # a disk without locks
            if kind == fcntl.LOCK_EX:
                raise
        yield


@contextlib.contextmanager
def take_turn(folder: Path) -> Iterator[None]:
    """Wait until nobody else holds ``folder``, and hold it; a disk without locks, or without room, keeps nobody."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context((folder / LOCK_FILE).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another btx submit is at work in {folder.parent}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_locked(run: Path, name: str = LOCK_FILE) -> bool:
    """Whether a runner is at work in ``run``; writes nothing, because a run may be looked at that is not ours."""
    if not (run / name).is_file():  # opening a pipe would wait forever
        return False
    try:
        with (run / name).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # not on a disk without locks
    return False
