"""The report of a run: what it writes, what it says is absent, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.report import build as report
from megatron_btx.report.inputs import read_run
from megatron_btx.report.pages import Paragraph
from megatron_btx.report.sections import make_study, show_data
from megatron_btx.report.stages import read_log
from megatron_btx.runner.run_dir import own_manifest
from megatron_btx.runner.tables import with_prefix
from tests.unit.report.example_run import (
    DOMAINS,
    LOSSES,
    TRAINING,
    build_report,
    change,
    evaluation,
    facts_of,
    make_model,
    make_run,
    results,
    set_loss,
    write_evaluation,
    write_json,
)


class PageReader(HTMLParser):
    """Collects what a browser would fetch, and which elements are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.elements: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def words_of(text: str) -> str:
    """The same with one space between words."""
    return " ".join(text.split())


def test_whole_report_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert report.main([str(run), "--require-facts"]) == 0
    printed = capsys.readouterr().out
    for name in ("report.md", "index.html", "results.json", "losses.png", "curves.png", "routing.png"):
        assert (run / "report" / name).stat().st_size > 1000, name
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[4:14]}
    assert list(rows) == [*LOSSES, "btx", "tokens"][:8] + ["tokens"]
    assert rows["seed"] == ["4.093", "1.654", "3.988", "2.800", "3.134"]
    assert "btx 3.964* 0.879 3.310 1.430 2.396" in words_of(printed)
    assert rows["dense"] == ["3.995", "0.819*", "3.269", "1.378*", "2.365*"]
    assert "btx - dense -0.031 +0.060 +0.041 +0.052 +0.030" in words_of(printed)
    assert len(re.findall(r"^true ", printed, re.MULTILINE)) == 5

    found = results(run)
    assert found == json.loads((run / "report" / "results.json").read_text(encoding="utf-8"))
    assert list(facts_of(found).values()) == [True] * 5
    assert found["btx_minus_dense"]["mean"] == pytest.approx(0.0305)
    assert found["models"]["btx"]["parameters"] == 870_464
    assert found["notes"] == []
    assert [found["stages"]["seed"]["tokens"], found["curves"]["seed"]["x"][-1]] == [1_024_000, 1_024_000]
    assert found["datasets"][1] == {
        "domain": "general", "split": "valid", "documents": 120, "tokens": 61_440, "size_bytes": 245_760
    }  # fmt: skip
    assert found["sources"]["tokenizer-model"] == "tokenizer.model"
    assert found["sources"]["math: valid"] == "1 file(s), 245,760 bytes: math.valid.jsonl"
    page = " ".join(read_page(run / "report" / "index.html").text)
    for number in (
        "2.396",
        "+0.030",
        "870,464",
        "598,848",
        "921,600",
        "61,440",
        "8,400,000",
        "0.309",
        "1 file(s), 245,760 bytes: math.valid.jsonl",
    ):
        assert number in page, number


@pytest.mark.usefixtures("undrawn")
def test_false_facts_change_the_exit_status_only_when_asked(tmp_path: Path) -> None:
    content = evaluation()
    set_loss("btx", "general", 4.1)(content)
    run = write_evaluation(tmp_path, content)
    assert report.main([str(run)]) == 0
    assert report.main([str(run), "--require-facts"]) == 1


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_dense_baseline_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_evaluation(tmp_path, evaluation(tuple(name for name in LOSSES if name not in ("dense", "average"))))
    assert report.main([str(run), "--require-facts"]) == 0
    printed = capsys.readouterr().out
    assert "btx - dense was not computed" in printed
    assert re.search(r"^not checked +On the mean over domains", printed, re.MULTILINE)
    page = " ".join(read_page(run / "report" / "index.html").text)
    assert "No evaluation of a model named dense." in page and "btx - dense was not computed" in page
    assert "dense" not in results(run)["models"]


@pytest.mark.usefixtures("undrawn")
def test_a_recipe_that_asks_for_no_baseline_hears_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor of datasets that it gave, and of nothing else that no stage of its plan would make."""
    run = write_evaluation(tmp_path, evaluation(tuple(name for name in LOSSES if name not in ("dense", "average"))))
    (run / "evaluate").rename(run / "evaluate-moe")
    planned = [{"stage": name} for name in ("evaluate-experts", "finetune", "evaluate-moe")]
    write_json(run / "plan.json", planned)
    assert report.main([str(run)]) == 0
    assert "dense" not in capsys.readouterr().out
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert not {"named", "dense", "statement"} & set(re.findall(r"\w+", text.split("## Absent or broken")[1]))
    write_json(run / "plan.json", [*planned, {"stage": "average"}, {"stage": "dense"}, {"stage": "data"}])
    notes = " ".join(results(run)["notes"])
    assert all(word in notes for word in ("named average", "named dense", "No data statement"))


@pytest.mark.usefixtures("undrawn")
def test_every_headline_says_that_what_it_beats_was_not_finetuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mixture is the one model that was finetuned, unless a dense one was."""
    from megatron_btx.report.figures import say_lowest_loss

    run = write_evaluation(tmp_path, evaluation(tuple(name for name in LOSSES if name != "dense")))
    assert report.main([str(run)]) == 0
    assert "which was not" in capsys.readouterr().out
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "The finetuned mixture beats the seed, which was not finetuned, on every domain." in text
    assert "the plain average and every single expert, none of which was finetuned." in text
    lead = text.split("## ")[0]
    assert "the seed, which was not finetuned, had 3.134; nothing finetuned stands beside it" in lead
    data = make_study([read_run(run)], "")
    assert say_lowest_loss(data.cast, data.lines).endswith("2.396, the only one that was finetuned")
    assert "btx: the mixture after finetuning, which no model above it had" in text
    set_loss("average", "general", 0.0)(content := evaluation())
    with_dense = (build_report(write_evaluation(tmp_path, content)).folder / "report.md").read_text()
    assert "0.030 above the dense model" in with_dense.split("## ")[0] and "beside it" not in with_dense


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("split", ["valid", "test", None])
def test_the_split_stands_wherever_a_loss_does(
    split: str | None, reported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the recipe's; a test loss is no validation loss. Without a recipe nobody knows."""
    on_split = ""
    if split:
        on_split = f" on the {split} split"
        (reported / "recipe.yaml").write_text(f"evaluate: {{split: {split}, tokens: 65536}}\n")
    if split == "valid":  # which is what a recipe that says nothing means
        (reported / "recipe.yaml").write_text("evaluate: {tokens: 65536}\n")
    assert report.main([str(reported)]) == 0
    printed = capsys.readouterr().out
    text = (reported / "report" / "report.md").read_text(encoding="utf-8")
    page = (reported / "report" / "index.html").read_text(encoding="utf-8")
    assert f"loss{on_split}, nats per token" in printed
    for shown in (text, page):
        assert f"2.396 nats per token{on_split};" in shown
        assert f"Loss{on_split} in nats per token" in shown and f"Loss{on_split} per model and domain" in shown
    assert f"\n## Loss{on_split}\n" in text
    for shown in (printed, text, page):
        assert "validation" not in shown.lower()
    study = make_study([read_run(reported)], "")
    from megatron_btx.report.figures import draw_losses, make_palette

    figure = draw_losses(study, make_palette(study))
    assert f"loss{on_split}, nats" in figure.get_supxlabel()


def test_stages_are_listed_after_what_they_were_made_from(reported_once: Path) -> None:
    text = (reported_once / "report" / "report.md").read_text(encoding="utf-8")
    accounting = text.split("## Accounting")[1].split("## Data")[0]
    order = re.findall(r"^\| ([a-z-]+) \|", accounting, re.MULTILINE)
    order = [name for name in order if name in TRAINING or name in ("data", "mix")]
    assert len(order) == len(TRAINING) + 2
    assert order.index("data") < order.index("seed") < order.index("expert-math") < order.index("mix")
    assert order.index("mix") < order.index("finetune")
    assert "| seed | data | 1,024,000 | 113.8 | 9,000 | 2.84 T |" in accounting


def test_page_needs_nothing_outside_itself(reported_once: Path) -> None:
    page = reported_once / "report" / "index.html"
    reader = read_page(page)
    assert len(reader.addresses) == 4
    assert all(address.startswith("data:image/png;base64,iVBORw0KGgo") for address in reader.addresses)
    assert not {"script", "link", "iframe"} & set(reader.elements)
    source = page.read_text(encoding="utf-8")
    assert "url(" not in source and "@import" not in source and "@media print" in source


def test_every_figure_is_there_for_print_too(reported_once: Path) -> None:
    folder = reported_once / "report"
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.pdf")} != set()
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))


def test_the_same_run_gives_the_same_bytes(reported: Path) -> None:
    folder = reported / "report"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in first:
        (folder / name).unlink()
    build_report(reported)
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_only_trained_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    for folder in ("evaluate-experts", "evaluate-dense", "evaluate-moe"):
        (run / folder / "evaluation.json").unlink()
    (run / "dense" / "manifest.json").unlink()
    (run / "data" / "datasets.json").unlink()
    assert report.main([str(run)]) == 0
    assert "no model was evaluated" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "report").glob("*.png")) == ["curves.png", "finetuning.png"]
    found = results(run)
    assert set(facts_of(found).values()) == {None}
    assert found["models"] == {} and found["datasets"] == []
    notes = " ".join(found["notes"])
    assert "Stage dense has a loss curve and no manifest" in notes and "datasets.json" in notes
    assert found["curves"]["dense"]["unit"] == "iterations"  # nothing says how many tokens they had


@pytest.mark.usefixtures("undrawn")
def test_old_figures_go_and_other_files_stay(reported: Path) -> None:
    run = reported
    (run / "report" / "log.txt").write_text("of the runner")
    write_json(run / "report" / "manifest.json", {"seconds": 1.0})
    for name in TRAINING:
        (run / name / "metrics.jsonl").unlink()
    build_report(run)
    names = {path.name for path in (run / "report").iterdir()}
    figures = {"losses.png", "losses.pdf", "routing.png", "routing.pdf"}
    assert names == {"index.html", "report.md", "results.json", "log.txt", "manifest.json", *figures}
    assert "report" not in results(run)["stages"]


@pytest.mark.usefixtures("undrawn")
def test_a_report_by_hand_marks_its_folder_for_the_run_to_go_on_and_leaves_earlier_folders_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.copytree(run / "seed", run / "seed.20261124-235959")
    folder = build_report(run).folder
    assert own_manifest(folder, "report").status == "made by hand"
    assert "seed.2026" not in (folder / "report.md").read_text()
    (folder / "manifest.json").write_text('{"stage": "report", "status": "finished"}')
    build_report(run)
    assert own_manifest(folder, "report").status == "finished"


@pytest.mark.usefixtures("undrawn")
def test_a_report_can_be_passed_on(reported: Path) -> None:
    """It says where the model lies and how it is loaded, by what it was made, and nothing of whose machine it was."""
    versions = {"python": "3.12.1", "megatron-core": "0.19.2", "commit": "0123abc"}
    settings = {"lr": 0.003, "seq-length": 256, "btx-freeze": ["attention"]}
    made = {"inputs": ["/home/somebody/texts"], "versions": versions, "settings": settings}
    change(reported / "seed" / "manifest.json", lambda content: content.update(made))
    write_json(reported / "export" / "manifest.json", {"stage": "export", "status": "finished", "versions": versions})
    folder = build_report(reported).folder
    text = (folder / "report.md").read_text(encoding="utf-8")
    export = text.split("## Export")[1].split("## ")[0]
    assert 'from_pretrained("export/model")' in export and "read back and verified" in export
    shown = text.split("## Settings")[1].split("## ")[0]
    assert "| seed | 0.003 | – | – | – | 256 | – | – | – |" in shown
    assert shown.count("Made by python 3.12.1, megatron-core 0.19.2, commit 0123abc.") == 1
    page, numbers = ((folder / name).read_text(encoding="utf-8") for name in ("index.html", "results.json"))
    for content in (text, page, numbers):
        assert not re.search(r"/(home|texts|tmp)/", content)
    assert json.loads(numbers)["stages"]["seed"]["inputs"] == ["texts"]
    change(reported / "export" / "manifest.json", lambda content: content.update(status="failed"))
    build_report(reported)
    assert "## Export" not in (folder / "report.md").read_text(encoding="utf-8")


def test_epochs_are_said(tmp_path: Path) -> None:
    """By the blend, the tokens that were read, and those that are there: 2,100,000 of each domain."""
    run = make_run(tmp_path)
    blend = [30, "data/math.train", 10, "data/code.train", 1, "elsewhere"]
    settings = {"train-data-path": blend[:4]}
    change(run / "finetune" / "manifest.json", lambda content: content.update(settings=settings, tokens=42_000_000))
    change(run / "seed" / "manifest.json", lambda content: content.update(settings={"train-data-path": blend[4:]}))
    (said,) = [block.text for block in show_data(read_run(run)) if isinstance(block, Paragraph)]
    assert said == "Epochs of finetune, the times that it read a text: math.train 15.00, code.train 5.00."


@pytest.mark.parametrize("width", [40, 80, 100])
def test_no_number_is_cut_on_a_terminal(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is wider is a line for every model."""
    content = evaluation()
    for model in content["models"].values():
        model["losses"] |= {f"{domain}-of-the-web": loss + 1 for domain, loss in model["losses"].items()}
    run = write_evaluation(tmp_path, content)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    report.print_core(report.make_report(run))
    shown = words_of(capsys.readouterr().out)
    for name, losses in LOSSES.items():
        assert name in shown and all(f"{loss:.3f}" in shown and f"{loss + 1:.3f}" in shown for loss in losses)
    assert "code-of-the-web" in shown and "…" not in shown


def test_flops_are_spelled_as_in_a_plan(reported_once: Path) -> None:
    text = (reported_once / "report" / "report.md").read_text(encoding="utf-8")
    assert with_prefix(2.84e12) == "2.84 T" and "| 2.84 T |" in text and "e+1" not in text


def test_hostile_names_are_escaped_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = '<script>alert("1")</script> | $x_1$ \x1b[31m *& more than a page is wide'
    run = tmp_path / "run"
    text = json.dumps(evaluation())
    for plain, hostile in (("math", name), ("expert-math", f"expert-{name}"), ("code", "$\\frac$")):
        text = text.replace(f'"{plain}"', json.dumps(hostile))
    write_evaluation(run, json.loads(text))
    assert report.main([str(run)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    reader = read_page(run / "report" / "index.html")
    assert "script" not in reader.elements
    assert any('<script>alert("1")</script>' in text for text in reader.text)
    markdown = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown and "\x1b" not in markdown
    table = [line for line in markdown.split("## Loss")[1].splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table[:9]} == {len(DOMAINS) + 3}
    assert name in results(run)["domains"]


def test_a_diverged_model_is_said_plainly_and_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    change(run / "evaluate-moe" / "evaluation.json", set_loss("btx", "math", math.nan))
    with open(run / "finetune" / "metrics.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"iteration": 1050, "lm loss": NaN}\n')
    assert report.main([str(run)]) == 0
    assert re.search(r"^btx +3\.964\* +NaN +3\.310 +1\.430 +NaN *$", capsys.readouterr().out, re.MULTILINE)
    found = results(run)
    assert found["models"]["btx"]["losses"]["math"] == "NaN"
    assert facts_of(found)["btx_beats_seed_everywhere"] is False
    assert facts_of(found)["btx_beats_average_and_experts"] is False
    assert "The loss of btx on math is not a finite number: nan." in found["notes"]
    assert any("finetune" in note and "not a finite number at 1 iterations" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluate-moe/evaluation.json", '{"models": {'),
        ("evaluate-moe/evaluation.json", '{"losses": {}}'),
        ("evaluate-moe/evaluation.json", '{"models": {"btx": {"losses": {"math": "low"}}}}'),
        (
            "evaluate-moe/evaluation.json",
            '{"experts": ["a"], "models": {"m": {"losses": {}, "routing": {"d": [[1, 2]]}}}}',
        ),
        ("seed/manifest.json", "[1]"),
        ("seed/metrics.jsonl", "not json\n"),
        ("data/datasets.json", ""),
    ],
)
def test_broken_files_are_refused_in_one_line_and_the_old_report_stands(
    file: str, content: str, reported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = reported
    before = (run / "report" / "index.html").read_bytes()
    (run / file).write_text(content, encoding="utf-8")
    assert report.main([str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert str(run / file) in captured.err
    assert (run / "report" / "index.html").read_bytes() == before


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        build_report(tmp_path / "nowhere")
    (tmp_path / "src").mkdir()
    with pytest.raises(InputError, match="not a run directory"):
        build_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_the_last_line_of_an_iteration_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 1, "lm loss": 3.0}\n{"iteration": 2, "lm loss": 2.9}\n{"iteration": 3, "lm l'
        '{"iteration": 2, "lm loss": 2.5}\n{"iteration": 2, "lm loss": 2.6}\n{"iteration": 3, "lm loss": 2.2}\n'
        '{"iteration": 4, "grad-norm": 1.0}\n'
    )
    assert read_log(path)[:2] == (((1, 3.0), (2, 2.6), (3, 2.2)), 4)


def test_a_skipped_step_is_in_no_curve_and_in_no_smoothing(tmp_path: Path) -> None:
    """It trained nothing: its loss is no number, or far above the others."""
    run = make_run(tmp_path)
    before = results(run)
    lines = [json.loads(line) for line in (run / "finetune" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if 500 <= line["iteration"] < 503:
            line |= {"lm loss": math.nan if line["iteration"] < 502 else 90.0, "skipped": 1.0}
    (run / "finetune" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = results(run)
    assert found["notes"] == []
    curve = found["curves"]["finetune"]
    assert "NaN" not in (*curve["loss"], *curve["smooth"]) and max(curve["smooth"]) < 4
    assert len(curve["x"]) < len(before["curves"]["finetune"]["x"])
    assert found["curves"]["dense"] == before["curves"]["dense"]


def test_tokens_per_iteration_come_from_the_configuration_of_an_unfinished_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "seed" / "manifest.json").unlink()
    (run / "seed" / "config.yaml").write_text("flags:\n  seq-length: 256\n  global-batch-size: 4\n")
    curve = results(run)["curves"]["seed"]
    assert (curve["unit"], curve["x"][-1]) == ("tokens", 1_024_000)


def test_many_experts_and_domains_stay_apart(tmp_path: Path) -> None:
    from megatron_btx.report.style import Palette

    names = [f"expert-d{number}" for number in range(25)]
    palette = Palette(names)
    assert len({(palette.colour(name), palette.hatch(name)) for name in names}) == 25
    assert len({(palette.colour(name), palette.dash(name)) for name in names}) == 25
    assert make_model("expert-d3", {}).look == make_model("btx", {}, experts=("d3",)).experts[0]  # one colour for both
    domains = [f"d{number}" for number in range(11)]
    losses = {name: dict.fromkeys(domains, 2.0) for name in ("seed", *names)}
    routing = {domain: [[1.0] * 25] * 3 for domain in domains}
    models: dict[str, Any] = {name: {"losses": of_model} for name, of_model in losses.items()}
    models["btx"] = {"losses": dict.fromkeys(domains, 1.0), "routing": routing}
    run = write_evaluation(tmp_path, {"models": models, "experts": names})
    assert facts_of(results(run))["btx_beats_seed_everywhere"] is True
    build_report(run)
    assert (tmp_path / "report" / "routing.png").stat().st_size > 1000


def test_help_needs_no_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0 and "--require-facts" in capsys.readouterr().out
