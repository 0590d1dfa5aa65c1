"""How fast experts are mixed: against cp of the same output, and against mergekit-moe, with memory.

    python benchmarks/convert.py --scratch FOLDER --output benchmarks/records/DATE-convert [--mergekit .../mergekit-moe]

Makes four models of 1.1 B parameters (22 layers, hidden 2048, feed-forward 5632, vocabulary 32,000, bf16, 2.2 GB each)
as Hugging Face folders and as Megatron checkpoints, then runs the contestants in turn, several times, each as a process
of its own from its start until its output is on the disk. Needs about 45 GB in FOLDER, which is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import machine

NAMES = ("math", "code", "wiki", "seed")
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--scratch", type=Path, required=True, help="folder on the disk to be measured; made, and removed")
    p.add_argument("--output", type=Path, required=True, help="folder for record.json and record.md")
    p.add_argument("--layers", type=int, default=22, help="layers of each model (default: 22, which makes 1.1 B)")
    p.add_argument("--repeats", type=int, default=5, help="rounds, in each of which every contestant runs (default: 5)")
    p.add_argument("--mergekit", type=Path, help="the program mergekit-moe (default: not compared)")
    return p


def make_models(folder: Path, layers: int) -> dict[str, Path]:
    """Four Hugging Face models whose weights are slices of one run of random numbers, and a tokenizer for mergekit."""
    import torch

    from megatron_btx.checkpoint.huggingface.config import arguments_from_config
    from megatron_btx.checkpoint.names import DIALECTS
    from megatron_btx.checkpoint.pieces import pieces_of
    from megatron_btx.checkpoint.safetensors import SafetensorsLayout
    from megatron_btx.checkpoint.sizes import Sizes
    from megatron_btx.checkpoint.stored import bytes_of

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, **SIZES}
    config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    arguments = arguments_from_config(config, "the benchmark")
    sizes = Sizes.of(arguments)
    pieces = [p for p in pieces_of(sizes) if p.required or p.name == "head.weight"]
    tensors = [(p.location(DIALECTS["llama"], sizes).key, p.shape, torch.bfloat16) for p in pieces]
    layout = SafetensorsLayout(tensors)
    numbers = (torch.randn(1 << 27, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for index, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        with (folder / name / "model.safetensors").open("wb") as file:
            for _, position, content in layout.objects:
                file.seek(position)
                file.write(content)
            at = index * 1_000_003
            for key, shape, _ in tensors:
                count = torch.Size(shape).numel()
                at = at if at + count <= len(numbers) else index * 1_000_003
                file.seek(layout.slot(key).position_bytes)
                file.write(bytes_of(numbers[at : at + count]))
                at += count
        (folder / name / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder / name)
    return {name: folder / name for name in NAMES}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 32,000 invented words: mergekit wants one."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, SIZES["vocab_size"])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    content = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"})
    )


def measured(command: list[str], inputs: list[Path], output: Path, previous: Path | None) -> dict[str, float]:
    """Run a command until its output is on the disk: seconds, CPU seconds, peak memory of its first process.

    Its inputs are read once before, so that they come from memory for everybody; then the output of the run before is
    removed, so that the memory of its pages is there for this one's (a virtual machine may have to ask its host).
    """
    for file in sorted(f for folder in inputs for f in folder.rglob("*") if f.is_file()):
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    if previous:
        shutil.rmtree(previous)
    os.sync()
    peaks = {"anonymous_mib": 0.0, "total_mib": 0.0}
    log = output.parent / "log.txt"
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, done))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    subprocess.run(["sync", "-f", str(output)], check=True)
    seconds = time.monotonic() - started
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "system_seconds": usage.ru_stime, "bytes": size, **peaks}


def _watch(pid: int, peaks: dict[str, float], done: threading.Event) -> None:
    while not done.wait(0.02):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        values = {
            line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith(("Rss", "VmRSS"))
        }
        peaks["anonymous_mib"] = max(peaks["anonymous_mib"], int(values.get("RssAnon", 0)) / 1024)
        peaks["total_mib"] = max(peaks["total_mib"], int(values.get("VmRSS", 0)) / 1024)


def contestants(models: dict[str, Path], megatron: dict[str, Path], scratch: Path, mergekit: Path | None) -> dict:
    """For each name: the command, what it reads, and where its output goes."""
    tool = [sys.executable, str(Path(__file__).resolve().parent.parent / "tools" / "convert_experts.py")]
    found: dict[str, tuple[list[str], list[Path], Path]] = {}
    for format_, sources in (("hf", models), ("megatron", megatron)):
        experts = [f"--expert={name}={path}" for name, path in sources.items()]
        for workers in (1, 2) if format_ == "hf" else (2,):
            out = scratch / f"ours-{format_}-{workers}"
            words = [*tool, *experts, "--output", str(out), "--output-format", format_, "--workers", str(workers)]
            found[f"ours {format_} -> {format_}, {workers} workers"] = (words, list(sources.values()), out)
        copied = scratch / f"kept-{format_}"
        subprocess.run([*tool, *experts, "--output", str(copied), "--output-format", format_], check=True)
        found[f"cp {format_}"] = (
            ["cp", "-r", str(copied), str(scratch / f"cp-{format_}")],
            [copied],
            scratch / f"cp-{format_}",
        )
    if mergekit:
        recipe = {"base_model": str(models["seed"]), "gate_mode": "random", "dtype": "bfloat16"}
        recipe["experts"] = [{"source_model": str(path), "positive_prompts": ["x"]} for path in models.values()]
        (scratch / "recipe.yaml").write_text(json.dumps(recipe))
        words = [str(mergekit), str(scratch / "recipe.yaml"), str(scratch / "mergekit")]
        words += ["--i-understand-this-is-not-useful-without-training"]
        found["mergekit-moe hf -> hf"] = (words, list(models.values()), scratch / "mergekit")
    return found


def main() -> int:
    """Make the models, measure, write the record."""
    options = parser().parse_args()
    options.scratch.mkdir(parents=True)
    try:
        models = make_models(options.scratch / "models", options.layers)
        tool = [sys.executable, str(Path(__file__).resolve().parent.parent / "tools" / "convert_hf.py"), "import"]
        megatron = {name: options.scratch / "megatron" / name for name in models}
        for name, path in models.items():
            subprocess.run([*tool, "--hf-model", str(path), "--output", str(megatron[name])], check=True)
            # As training leaves them: a source with a manifest would be checked against it first, which takes time.
            (megatron[name] / "manifest.json").unlink()
        runs: dict[str, list[dict[str, float]]] = {}
        field = contestants(models, megatron, options.scratch, options.mergekit)
        previous = None
        for number in range(options.repeats):
            for name, (command, inputs, output) in field.items():
                result = measured(command, inputs, output, previous)
                previous = output
                print(f"round {number} {name}: {result['seconds']:.1f} s", flush=True)
                runs.setdefault(name, []).append(result)
    finally:
        shutil.rmtree(options.scratch)
    write_record(options, runs)
    return 0


def ratios(runs: dict[str, list[dict[str, float]]], name: str, other: str) -> list[float]:
    """Seconds of one over seconds of the other, round by round."""
    return [a["seconds"] / b["seconds"] for a, b in zip(runs[name], runs[other], strict=True)]


def write_record(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    """record.json with every number, and record.md made from it."""
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine()}
    record |= {"layers": options.layers, "repeats": options.repeats, "runs": runs, "ratios": {}}
    if options.mergekit:
        python = options.mergekit.parent / "python"
        version = "import importlib.metadata as m; print(m.version('mergekit'))"
        answer = subprocess.run([str(python), "-c", version], capture_output=True, text=True, check=True)
        record["mergekit"] = answer.stdout.strip()
    lines = [f"# Mixing four models of {options.layers} layers, {record['date']}", ""]
    cpu = record["machine"]
    lines += [f"{cpu['cpu']}, {cpu['cores']} cores, kernel {cpu['kernel']}, commit {cpu['commit']}", ""]
    lines += [
        "| | GB written | seconds: median (least to most) | CPU s | anonymous MiB | total MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        seconds = [r["seconds"] for r in results]
        row = [name, f"{results[0]['bytes'] / 1e9:.2f}"]
        row.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})")
        row += [f"{statistics.median(r[k] for r in results):.1f}" for k in ("cpu_seconds",)]
        row += [f"{max(r[k] for r in results):.0f}" for k in ("anonymous_mib", "total_mib")]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Ratios, round by round:", ""]
    for name in runs:
        for other in (n for n in runs if name.startswith("ours") and not n.startswith("ours")):
            if other.split()[1] == name.split()[1]:
                found = ratios(runs, name, other)
                record["ratios"][f"{name} / {other}"] = found
                spread = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
                lines.append(f"- {name} / {other}: {spread}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "record.json").write_text(json.dumps(record, indent=1))
    (options.output / "record.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
