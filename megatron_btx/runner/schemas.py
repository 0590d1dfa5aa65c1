"""What the files of a run hold, typed; directory.py reads them.

A value of another type than it should have is None: one odd number must not hide the rest of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_btx.plan.fingerprint import LARGEST_COUNT


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
PlannedCount = Annotated[int | None, Field(strict=True, gt=-(2**64), lt=2**64), AfterValidator(read_count)]
"""Another type or a huge number is of no plan that btx wrote."""
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
    started: Number = None
    """When its last start began, in seconds since 1970."""
    rerun: Settings = None
    """The --rerun that began it: its stages and its number."""

    @property
    def is_finished(self) -> bool:
        """Whether the stage came to its end."""
        return self.status == "finished"

    @property
    def rerun_number(self) -> int:
        """Which of the run's reruns began the stage, from 1; 0 when none did."""
        if self.rerun is None:
            return 0
        return read_count(self.rerun.get("number")) or 0


class PlannedStage(_Record):
    """One entry of plan.json."""

    stage: str
    steps: PlannedCount = None
    tokens: PlannedCount = None
    fingerprint: Text = None
    """None for a stage that only shows what others made."""


class MetricsLine(_Record):
    """One line of metrics.jsonl: what was logged after one step. Metrics by other names are in ``model_extra``."""

    iteration: int
    time: Number = None
    """Seconds since 1970."""
    loss: Number = Field(default=None, alias="lm loss")
    """Training loss, nats per token; may be NaN. None of a skipped step, which trained nothing."""

    def numbers(self) -> Iterator[tuple[str, float]]:
        """(name, value) of every other metric that is a number."""
        for name, value in (self.model_extra or {}).items():
            found = read_number(value)
            if found is not None:
                yield name, found


class ModelRow(_Record):
    """One row of models.json, the run's table of models."""

    name: str
    """As evaluations call it."""
    role: str
    """seed, expert, average, mix, btx, dense, or what a later version knows."""
    home: Text = None
    """An expert's domain."""
    variant: Text = None
    """Of an ablation."""
    seed: Count = None
    """Of an ablation's row: what draws its routers and shuffles its data."""
    stage: Text = None
    """The stage that makes it; None or empty for a given model."""
    meaning: Text = None
    """What it is, as a phrase."""


LOSS = "loss"
"""The measure of every evaluation: mean cross-entropy, nats per token."""


class Score(_Record):
    """One number that was measured of a model."""

    model: str
    measure: str
    data: str
    """The domain or the task."""
    value: float
    """May be NaN."""
    stderr: Number = None
    """Its standard error over the data; None where it was not taken."""
    count: Count = None
    """Of what it is the mean: tokens of a loss, items of a task."""
    unit: str = ""


class ModelEvaluation(_Record):
    """What evaluation.json says of one model. An earlier version has its losses here, and no scores."""

    losses: dict[str, float] = Field(default_factory=dict)
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

    scores: list[Score] = Field(default_factory=list)
    """All that was measured."""
    models: dict[str, ModelEvaluation]
    experts: list[str] | None = None
    """Names of the experts, in the order of the routing's shares; None where no mixture was evaluated."""
    eod_mask_loss: bool | None = None
    """Whether the loss of the tokens behind documents was left out; None where an earlier version wrote it."""
