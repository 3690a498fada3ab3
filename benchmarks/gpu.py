"""What a GPU does: Gram products by format, solvers on layers of a 7B model, and blocks of one through `maskopt prune`.

    python benchmarks/gpu.py [--device cuda] [--only products,layers,model] [--layers 4096x4096,11008x4096,4096x11008]

Products: tokens in float32 against bfloat16, the former on the ordinary units, the latter on tensor cores; errors are
relative to the two inputs' own sizes, against float64. Layers: correlated inputs with a power-law spectrum, 8 d tokens.
Model: random weights in the shape of Llama-2-7B, so that only seconds and bytes count; --blocks 32 is all of it.
Writes benchmarks/results/gpu.{md,json} after every part. Parts that do not run keep their earlier figures, and a model
replaces the one with as many blocks and states in the same place.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from iteration import seconds
from large_models import random_llama
from study import numbers, split_pattern, words
from torch import Tensor

from maskopt.demo.corpus import training_text
from maskopt.models import model_class, pruning_cost
from maskopt.models.sums import add_square, mirror, multipliable
from maskopt.oracles import parse_masks
from maskopt.precision import full_precision
from maskopt.problems import LayerReconstruction
from maskopt.solvers import make_solver, solve
from maskopt.weights import make_weights

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("wanda", "continuation")  # solvers that leave weights as they are


def usual_seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median time of a call, after one that does not count."""
    return median([seconds(call, device) for _ in range(repeats + 1)][1:])


def inputs(d: int, tokens: int, device: torch.device) -> Tensor:
    """Return inputs with a power-law spectrum in a random basis, float32, shape (tokens, d)."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, device=device)).Q
    spectrum = torch.arange(1, d + 1, device=device) ** -0.75
    found: Tensor = (torch.randn(tokens, d, device=device) * spectrum) @ basis * d**0.5
    return found + 0.5 * torch.randn(d, device=device)


def products(widths: list[int], tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Return time and error of Gram matrices of the same tokens in two formats."""
    rows = []
    for d in widths:
        x = inputs(d, tokens, device).bfloat16()
        exact = x.double().T @ x.double()
        scale = exact.diagonal().sqrt()
        figures: dict[str, Any] = {"d": d, "tokens": tokens}
        for name, given in (("float32", x.float()), ("bfloat16", x)):
            total = torch.zeros(d, d, device=device)
            with full_precision():
                took = usual_seconds(partial(_add_anew, total, given), device)
            mirror(total)
            error = ((total.double() - exact) / scale / scale.unsqueeze(1)).abs().max().item()
            figures[name] = {"seconds": took, "flop_per_second": 2.0 * tokens * d * d / took, "error": error}
        if d <= 4096:
            figures["least_eigenvalue"] = (torch.linalg.eigvalsh(total.double())[0] / exact.diagonal().mean()).item()
        rows.append(figures)
        print(json.dumps(figures), flush=True)
    return rows


def _add_anew(total: Tensor, rows: Tensor) -> None:
    add_square(total.zero_(), multipliable(rows))


def layers(
    shapes: list[str], patterns: list[str], methods: list[str], memory: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield error, seconds and memory of every method on every layer."""
    for shape in shapes:
        height, d = map(int, shape.split("x"))
        x = inputs(d, 8 * d, device)
        gram = x.T @ x
        del x
        weight = torch.randn(height, d, device=device) / d**0.5
        for pattern in patterns:
            masks = parse_masks(*split_pattern(pattern))
            row: dict[str, Any] = {"shape": shape, "masks": repr(masks), "methods": {}}
            for method in methods:
                solver = make_solver(method) if method in KEPT else make_weights(method)
                problem = LayerReconstruction(weight, gram)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                found = solve(problem, masks, solver, memory=memory)
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                row["methods"][method] = {"error": found.relative_error, "seconds": found.seconds, "bytes": peak}
                print(shape, masks, method, row["methods"][method], flush=True)
            yield row


def model(
    hidden: int, blocks: int, states: str, samples: int, length: int, memory: str, device: torch.device
) -> dict[str, Any]:
    """Return what pruning the first blocks of a random Llama of 7 billion parameters takes, and what is counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {
            "hidden_size": hidden,
            "intermediate_size": hidden * 11008 // 4096,
            "num_attention_heads": hidden // 128,
        }
        random_llama(folder / "model", blocks, device.type, max_position_embeddings=length, **shape)
        (folder / "text.txt").write_text(training_text(800_000))
        command = [sys.executable, "-m", "maskopt", "prune", str(folder / "model"), str(folder / "out")]
        command += ["--calibration", str(folder / "text.txt"), "--pattern", "2:4", "--samples", str(samples)]
        command += ["--seqlen", str(length), "--memory", memory, "--device", device.type, "--states", states, "--quiet"]
        began = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command += ["--json", str(folder / "figures.json")]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - began
        figures = json.loads((folder / "figures.json").read_text())
        cost = pruning_cost(*model_class(str(folder / "model")), samples, length)
    found = {
        "hidden": hidden,
        "blocks": blocks,
        "states": states,
        "windows": samples,
        "tokens": samples * length,
        "command_seconds": took,
        "calibration_seconds": figures["calibration_seconds"],
        "solve_seconds": figures["solve_seconds"],
        "peak_bytes": figures["memory_bytes"]["peak"],
        "mean_relative_error": figures["mean_relative_error"],
        "counted": {part: getattr(cost, part) for part in ("running", "grams", "targets", "solving")},
    }
    print(json.dumps(found), flush=True)
    return found


def text(figures: dict[str, Any]) -> str:
    """Return the tables."""
    parts = []
    if "products" in figures:
        lines = [
            [
                f"d = {row['d']}, {row['tokens']} tokens",
                *(f"{row[kind]['flop_per_second'] / 1e12:.0f}" for kind in ("float32", "bfloat16")),
                *(f"{row[kind]['error']:.1e}" for kind in ("float32", "bfloat16")),
            ]
            for row in figures["products"]
        ]
        head = ["Gram matrix of", "float32, TFLOP/s", "bfloat16, TFLOP/s", "float32, error", "bfloat16, error"]
        parts.append("Speeds count the whole product, of which little more than half is computed.\n")
        parts.append(report.table(head, lines))
    if "layers" in figures:
        lines = []
        for row in figures["layers"]:
            for method, found in row["methods"].items():
                size = "" if found["bytes"] is None else f"{found['bytes'] / 1e9:.1f}"
                name = f"{row['shape']}, {row['masks']}, {method}"
                lines.append([name, f"{found['error']:.4f}", f"{found['seconds']:.2f}", size])
        parts += ["", report.table(["layer, masks, method", "relative error", "seconds", "peak, GB"], lines)]
    for found in figures.get("models", []):
        counted = sum(found["counted"].values())
        took = found["calibration_seconds"] + found["solve_seconds"]
        parts += [
            "",
            report.table(
                [
                    f"Llama, hidden {found['hidden']}, {found['blocks']} blocks, {found['tokens']} tokens, 2:4, "
                    f"states on {found['states']}",
                    "",
                ],
                [
                    ["running blocks and Gram matrices, s", f"{found['calibration_seconds']:.1f}"],
                    ["masks and weights, s", f"{found['solve_seconds']:.1f}"],
                    ["whole command, s", f"{found['command_seconds']:.1f}"],
                    ["counted, PFLOP", f"{counted / 1e15:.2f}"],
                    ["counted over both times, TFLOP/s", f"{counted / took / 1e12:.0f}"],
                    ["seconds a block", f"{took / found['blocks']:.1f}"],
                    ["peak of the device, GB", f"{(found['peak_bytes'] or 0) / 1e9:.1f}"],
                ],
            ),
        ]
    return "\n".join(parts)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=words, default=["products", "layers", "model"])
    parser.add_argument("--widths", type=numbers, default=[4096, 11008])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=words, default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--patterns", type=words, default=["2:4", "per-row:0.6"])
    parser.add_argument("--methods", type=words, default=["wanda", "continuation", "sparsegpt", "admm", "alps", "best"])
    parser.add_argument("--memory", type=float, default=4e9, help="bytes of working memory of the solvers")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--blocks", type=numbers, default=[2])
    parser.add_argument("--states", type=words, default=["device", "host"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    options = parser.parse_args()
    device = torch.device(options.device)
    earlier = report.RESULTS / "gpu.json"
    figures = json.loads(earlier.read_text())["figures"] if earlier.exists() else {}
    figures["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def write() -> None:
        report.write("gpu", f"On a GPU: {figures['device']}", text(figures), {"figures": figures})

    if "products" in options.only:
        figures["products"] = products(options.widths, options.tokens, device)
        write()
    if "layers" in options.only:
        figures["layers"] = []
        for row in layers(options.layers, options.patterns, options.methods, int(options.memory), device):
            figures["layers"].append(row)
            write()
    if "model" in options.only:
        shape = (options.samples, options.seqlen, f"{int(options.memory)}", device)
        for blocks in options.blocks:
            for states in options.states:
                found = model(options.hidden, blocks, states, *shape)
                others = [
                    one for one in figures.get("models", []) if (one["blocks"], one["states"]) != (blocks, states)
                ]
                figures["models"] = [*others, found]
                write()


if __name__ == "__main__":
    main()
