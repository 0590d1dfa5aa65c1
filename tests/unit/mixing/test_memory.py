"""Memory: what a conversion holds at once depends on its workers, never on the models' size or number."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.runner import REPOSITORY

MIB = 2**20
GROWTH_MIB = 60
MEASURE = """
import sys, threading
from pathlib import Path
import megatron_btx.mixing.api
from megatron_btx.mixing.cli import main

largest, over = 0, threading.Event()
def watch():
    global largest
    while not over.wait(0.005):
        lines = Path("/proc/self/status").read_text().splitlines()
        largest = max(largest, *(int(l.split()[1]) for l in lines if l.startswith("RssAnon")))
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
code = main(sys.argv[1:])
over.set(), watcher.join()
print("RssAnon", largest, file=sys.stderr)
sys.exit(code)
"""
"""Runs the command and tells the largest anonymous memory: files that the system keeps in its cache do not count."""


def model(folder: Path, ffn: int, layers: int, seed: int) -> int:
    """A Llama in bf16 whose numbers are written as they are made; returns its bytes."""
    hidden, vocabulary = 512, 4096
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden}
    config |= {"intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, ffn)}
    shapes |= {"model.norm.weight": (hidden,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    text, generator = json.dumps(header).encode(), np.random.default_rng(seed)
    pattern = generator.integers(0x3C00, 0x3F80, MIB // 2, dtype=np.uint16).tobytes()  # bf16 from 0.008 to 1
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, MIB):
            file.write(pattern[: min(MIB, end - at)])
    return end


def peak_mib(models: list[Path], output: Path, *more: str) -> float:
    """The largest anonymous memory of a process that mixes them."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, "--workers", "2", "--output", str(output), *more]
    command += [f"--expert=e{number}={path}" for number, path in enumerate(models)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("RssAnon")[1].split()[0]) / 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied: what is made here is more than what is kept of other tests."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("output_format", ["hf", "megatron"])
def test_memory_does_not_grow(output_format, disk, record_property):
    """Four models of 60 MB, two and four of 165 MB: within 60 MiB of each other and far under 1 GiB."""
    small = [disk / "small" / str(number) for number in range(4)]
    large = [disk / "large" / str(number) for number in range(4)]
    sizes = [model(path, ffn=3072, layers=4, seed=n) for n, path in enumerate(small)]
    sizes += [model(path, ffn=16384, layers=3, seed=n) for n, path in enumerate(large)]
    assert 50e6 < sizes[0] < 70e6 and 155e6 < sizes[-1] < 175e6
    peaks = {}
    for name, models in (("small", small), ("two large", large[:2]), ("four large", large)):
        started = time.monotonic()
        peaks[name] = peak_mib(models, disk / "out", "--output-format", output_format, "--overwrite")
        record_property(name, f"{peaks[name]:.0f} MiB, {time.monotonic() - started:.1f} s")
    assert max(peaks.values()) - min(peaks.values()) < GROWTH_MIB, peaks
    assert max(peaks.values()) < 600, peaks
