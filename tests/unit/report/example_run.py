"""A finished run as its stages would leave it, with the numbers of a study at this size, for the report's tests."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron_btx.report.build import Report, make_report, write_report
from megatron_btx.report.models import Model, guess_row
from megatron_btx.report.pages import to_json
from megatron_btx.runner.run_dir import make_loss

DOMAINS = ("general", "math", "code", "knowledge")
LOSSES = {
    "seed": (4.093, 1.654, 3.988, 2.800),
    "expert-math": (4.53, 0.886, 5.45, 5.69),
    "expert-code": (4.50, 3.52, 3.256, 5.07),
    "expert-knowledge": (4.63, 4.53, 5.50, 1.461),
    "average": (4.226, 1.756, 4.048, 2.691),
    "mix": (4.249, 1.826, 4.084, 2.760),
    "btx": (3.964, 0.879, 3.310, 1.430),
    "dense": (3.995, 0.819, 3.269, 1.378),
}
EXPERTS = ("math", "code", "knowledge", "seed")
MIXED = ("expert-math", "expert-code", "expert-knowledge", "seed")
TOKENS = dict(zip(DOMAINS, (61_440, 40_960, 61_440, 20_480), strict=True))
TRAINING = {  # stage: (iterations, tokens, first loss, last loss, made from)
    "seed": (1000, 1_024_000, 7.6, 3.6, ["data"]),
    "expert-math": (300, 307_200, 1.9, 0.9, ["data", "seed"]),
    "expert-code": (300, 307_200, 4.1, 3.3, ["data", "seed"]),
    "expert-knowledge": (300, 307_200, 2.9, 1.5, ["data", "seed"]),
    "finetune": (1050, 1_075_200, 3.3, 2.5, ["data", "mix"]),
    "dense-domains": (900, 921_600, 3.0, 1.9, ["data", "seed"]),
    "dense": (1050, 1_075_200, 3.1, 2.45, ["data", "dense-domains"]),
}


def routing_of(strength: float, layers: int = 4, experts: tuple[str, ...] = EXPERTS) -> dict[str, list[list[float]]]:
    """Shares in which the expert at home (the last one where there is none) has a weight above the others."""
    draw = random.Random(int(strength * 100))
    table = {}
    for domain in DOMAINS:
        home = experts.index(domain) if domain in experts else len(experts) - 1
        rows = [[draw.uniform(0.8, 1.2) + strength * (at == home) for at in range(len(experts))] for _ in range(layers)]
        table[domain] = [[weight / sum(row) for weight in row] for row in rows]
    return table


def evaluation(names: tuple[str, ...] = tuple(LOSSES)) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for name in names:
        mixture = name in ("mix", "btx")
        models[name] = {
            "checkpoint": f"runs/quickstart/{name}/checkpoint",
            "parameters": 870_464 if mixture else 463_040,
            "active_parameters": 598_848 if mixture else 463_040,
            "losses": dict(zip(DOMAINS, LOSSES[name], strict=True)),
            "tokens": dict(TOKENS),
            "routing": routing_of({"mix": 0.1, "btx": 1.6}[name]) if mixture else None,
        }
    return {"models": models, "experts": list(EXPERTS)}


def datasets() -> dict[str, Any]:
    """datasets.json of texts with files for every split."""
    splits = {"train": (9_000, 2_100_000), "valid": (120, 61_440), "test": (118, 60_100)}
    sizes: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    for domain in DOMAINS:
        sizes[domain] = {}
        sources[domain] = {}
        for split, (documents, tokens) in splits.items():
            sizes[domain][split] = {"documents": documents, "tokens": tokens, "bin_sha256": "0" * 64}
            sources[domain][split] = {"files": [f"/texts/{domain}.{split}.jsonl"], "bytes": tokens * 4}
    tokenizer = {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": "/texts/tokenizer.model"}
    return {"tokenizer": tokenizer, "seed": 1234, "domains": sizes, "sources": sources}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_run(root: Path, seed: int = 7) -> Path:
    """A finished quickstart, as its stages would leave it, in ``root``."""
    run, draw = root / "quickstart", random.Random(seed)
    for stage, (iterations, tokens, first, last, parents) in TRAINING.items():
        manifest = {"tokens": tokens, "seconds": tokens / 9_000, "flops": 6 * 463_040 * tokens, "parents": parents}
        write_json(run / stage / "manifest.json", manifest)
        with open(run / stage / "metrics.jsonl", "w", encoding="utf-8") as lines:
            for iteration in range(1, iterations + 1):
                loss = last + (first - last) * math.exp(-6 * iteration / iterations) + draw.gauss(0, 0.12)
                line = {"iteration": iteration, "time": 1.7e9 + iteration, "lm loss": loss}
                if stage == "finetune" and iteration % 150 == 0:
                    line |= watched_losses(iteration / iterations)
                lines.write(json.dumps(line) + "\n")
    write_json(run / "mix" / "manifest.json", {"seconds": 3.1, "parents": dict.fromkeys(MIXED, "sha")})
    write_json(run / "data" / "manifest.json", {"seconds": 41.0, "parents": []})
    write_json(run / "data" / "datasets.json", datasets())
    baselines = ("average", "dense")
    experts = tuple(name for name in LOSSES if name not in ("mix", "btx", *baselines))
    write_json(run / "evaluate-experts" / "evaluation.json", evaluation(experts))
    write_json(run / "evaluate-dense" / "evaluation.json", evaluation(baselines))
    write_json(run / "evaluate-moe" / "evaluation.json", evaluation(("mix", "btx")))
    return run


def watched_losses(part: float) -> dict[str, float]:
    """What finetuning logs of every domain on its way from the mix to the finetuned mixture."""
    left = math.exp(-4 * part)
    losses = {}
    for at, domain in enumerate(DOMAINS):
        losses[domain] = LOSSES["btx"][at] + left * (LOSSES["mix"][at] - LOSSES["btx"][at])
    named = {f"lm loss validation {domain}": loss for domain, loss in losses.items()}
    return {**named, "lm loss validation mean": sum(losses.values()) / len(losses)}


ABLATION = {  # variant: the mean loss of each of its seeds, and how many experts are dead
    "top2": {1: (2.31, 0), 2: (2.335, 1)},
    "soft": {1: (2.42, 0), 2: (2.4, 0)},
    "top1": {2: (2.61, 3)},
}


def make_ablation(root: Path) -> Path:
    """A finished ablation of three variants and two seeds: mixtures of three layers and four experts."""
    run, draw = root / "ablation", random.Random(3)
    variants = {name: {"seeds": list(seeds)} if len(seeds) < 2 else None for name, seeds in ABLATION.items()}
    write_json(run / "recipe.yaml", {"ablation": {"seeds": [1, 2], "split": "test", "variants": variants}})
    planned = [{"stage": name} for name in ("data", "seed", "evaluate-experts")]
    for seed in (1, 2):
        planned.append({"stage": f"mix-s{seed}"})
        for name, seeds in ABLATION.items():
            if seed in seeds:
                planned.append({"stage": f"ablation-{name}-s{seed}"})
                write_finetuning(run / f"ablation-{name}-s{seed}", *seeds[seed], draw)
    write_json(run / "plan.json", [*planned, {"stage": "report"}])
    return run


def write_finetuning(stage: Path, loss: float, dead: int, draw: random.Random) -> None:
    """A finetuning of a mixture, as it leaves its metrics: training, routing, and the loss per domain at its end."""
    loads = {}
    for layer in range(3):
        weights = [draw.uniform(0.5, 1.5) for _ in EXPERTS]
        loads |= {f"moe/load_layer_{layer}_expert_{at}": weight / sum(weights) for at, weight in enumerate(weights)}
    dropped = {f"moe/dropped_layer_{layer}": 0.01 * layer for layer in range(3)}
    losses = {domain: loss + offset for domain, offset in zip(DOMAINS, (1.5, -1.0, 0.5, -1.0), strict=True)}
    watched = {f"lm loss validation {domain}": value for domain, value in losses.items()}
    watched["lm loss validation mean"] = sum(losses.values()) / len(losses)
    lines: list[dict[str, Any]] = []
    for iteration in (10, 20, 30, 40):
        line = {"iteration": iteration, "time": 1.7e9 + iteration, "lm loss": loss + 10 / iteration}
        lines.append({**line, **loads, **dropped, "moe/dead_experts": float(dead)})
    lines[-1] |= watched
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    manifest = {"status": "finished", "steps": 40, "tokens": 40_960, "seconds": 4.5, "flops": 1.1e11, "parents": {}}
    write_json(stage / "manifest.json", {"stage": stage.name, **manifest})


def change(path: Path, edit: Any) -> None:
    """Apply ``edit`` to the JSON in ``path``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    write_json(path, content)


def build_report(*runs: Path) -> Report:
    """Write the report of runs."""
    report = make_report(*runs)
    write_report(report)
    return report


def results(run: Path) -> dict[str, Any]:
    """What a report's results.json holds, without its figures, whose drawing takes seconds."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON as the standard has it")

    found: dict[str, Any] = json.loads(to_json(make_report(run).numbers["results.json"]), parse_constant=refuse)
    return found


def make_model(name: str, losses: dict[str, float], **about: Any) -> Model:
    """A model as an evaluation states it."""
    scores = tuple(make_loss(name, domain, loss, None) for domain, loss in losses.items())
    return Model(guess_row(name), scores, **about)


def facts_of(found: dict[str, Any]) -> dict[str, bool | None]:
    return {fact["name"]: fact["holds"] for fact in found["facts"]}


def write_evaluation(run: Path, content: dict[str, Any]) -> Path:
    write_json(run / "evaluate" / "evaluation.json", content)
    return run


def set_loss(name: str, domain: str, loss: float) -> Any:
    def edit(content: dict[str, Any]) -> None:
        if name in content["models"]:
            content["models"][name]["losses"][domain] = loss

    return edit
