"""Time and memory of `maskopt prune`, side by side with another version of it, and with depth.

    python benchmarks/large_models.py [MODEL,CALIBRATION ...] [--before CHECKOUT] [--depths 4,24]

Random Llama models of hidden size 1024 and of each depth are made and pruned as people do it, in processes of their
own: seconds are those of the report, memory is what the system counts as resident at most. With --before, a checkout of
an earlier version prunes the first of these models, and all others given, at the same time on another core, so that
both see the same machine. Models are folders, and calibration texts files. Writes
benchmarks/results/large-models.{md,json}.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import report
import torch
from study import numbers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from maskopt.demo.run import MODEL

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--pattern", "per-row", "--sparsity", "0.5", "--samples", "16", "--seqlen", "256")
FEW = ("--option", "iterations=8")  # the memory of a solver does not depend on its iterations


def random_llama(folder: Path, depth: int, device: str = "cpu", **changes: int) -> Path:
    """Save a random Llama in bfloat16 with the demo model's tokenizer; changes are settings of its configuration."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "max_position_embeddings": 1024}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=depth, **{**sizes, **changes})
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pruned(checkout: Path, model: Path, text: Path, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """Prune a model by one version in a process of its own, and return what that cost."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "maskopt", "prune", str(model), str(out / "out"), "--calibration", str(text)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options, "--quiet", "--json", str(out / "report.json")],
        cwd=checkout,  # "-m" looks into the working folder first
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    # Each process has its own account, unlike what RUSAGE_CHILDREN says of all.
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "the command failed")
    figures = json.loads((out / "report.json").read_text())
    return {
        "calibration_seconds": figures["calibration_seconds"],
        "solve_seconds": figures["solve_seconds"],
        "processor_seconds": used.ru_utime + used.ru_stime,
        "resident_bytes": resident_bytes(used),
        "mean_relative_error": figures["mean_relative_error"],
    }


def resident_bytes(used: resource.struct_rusage) -> float:
    """Return what was in memory of a process at most."""
    return used.ru_maxrss if sys.platform == "darwin" else 1024.0 * used.ru_maxrss


def compared(before: Path | None, cases: Sequence[tuple[str, Path, Path, Sequence[str]]], folder: Path) -> list[Any]:
    """Return what each case costs now and before."""
    rows = []
    for name, model, text, options in cases:
        with ThreadPoolExecutor() as pool:
            versions = {"now": ROOT, **({} if before is None else {"before": before})}
            runs = {key: pool.submit(pruned, path, model, text, folder, options) for key, path in versions.items()}
            row = {"case": name, **{key: run.result() for key, run in runs.items()}}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL,CALIBRATION[,TEXT]")
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    parser.add_argument("--depths", type=numbers, default=[4, 24])
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="calibration text of the random models")
    parser.add_argument("--blocks", default="model.layers.[0-5].*", help="layers of given models that are pruned")
    arguments = parser.parse_args()
    before = None if arguments.before is None else arguments.before.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: what this one has had at most would count as that of the processes that it starts.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            small = {
                depth: pool.submit(random_llama, folder / str(depth), depth).result() for depth in arguments.depths
            }
        given = [each.split(",")[:2] for each in arguments.models]
        shape = ("--pattern", "2:4", "--samples", "64", "--seqlen", "512", "--include", arguments.blocks)
        cases = [
            (f"{Path(model).name}, {arguments.blocks}", Path(model).resolve(), Path(text).resolve(), shape)
            for model, text in given
        ]
        first = next(iter(small))
        cases.append((f"random, {first} blocks", small[first], arguments.text.resolve(), SMALL))
        rows = compared(before, cases, folder)
        few = (*SMALL, *FEW)
        depth = {number: pruned(ROOT, model, arguments.text.resolve(), folder, few) for number, model in small.items()}
    figures = {"cases": rows, "depth": depth}
    report.write("large-models", "Time and memory of pruning large models", text_of(rows, depth), figures)


def text_of(rows: Sequence[dict[str, Any]], depth: dict[int, dict[str, float]]) -> str:
    """Return the tables."""
    head = ["model, layers", "figure", "before", "now", "ratio"]
    lines = []
    for row in rows:
        for key, label, scale in (
            ("calibration_seconds", "running blocks and Gram matrices, s", 1.0),
            ("solve_seconds", "masks and weights, s", 1.0),
            ("processor_seconds", "whole command, processor s", 1.0),
            ("resident_bytes", "peak resident memory, MB", 1e-6),
            ("mean_relative_error", "mean relative error", 1.0),
        ):
            now, before = row["now"][key] * scale, row.get("before", {}).get(key)
            old, ratio = ("", "") if before is None else (f"{before * scale:.4g}", f"{now / (before * scale):.3f}")
            lines.append([row["case"], label, old, f"{now:.4g}", ratio])
    memory = [[str(number), f"{each['resident_bytes'] / 1e6:.0f}"] for number, each in depth.items()]
    return (
        "One thread for each process, both versions of a case at the same time.\n\n"
        + report.table(head, lines)
        + "\n\nWith 8 iterations of the solver:\n\n"
        + report.table(["blocks", "peak resident memory, MB"], memory)
    )


if __name__ == "__main__":
    main()
