"""Sizes of packed folders, and what packing and loading them takes.

    python benchmarks/packing.py [MODEL,CALIBRATION ...] [--sparsities 0.5,0.7] [--repeats 3]

Prunes each model with Wanda, per row, packs its folder without and with compression, and loads the dense and the packed
folders; every step in a process of its own, the best of several for times. The demo model is always among them. Writes
benchmarks/results/packing.{md,json}.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

from maskopt.demo.run import MODEL

README = Path(__file__).parent.parent / "README.md"

# Peak memory is counted beyond what imports, and the first model of the same class, have taken.
PACK = """
import json, sys
import maskopt.models
from maskopt.packed.folder import pack
from maskopt.models.heap import peak_bytes
before = peak_bytes("cpu")
figures = pack(sys.argv[1], sys.argv[2], compress=sys.argv[3] == "compressed").to_json()
print(json.dumps({**figures, "peak": peak_bytes("cpu") - before}))
"""
LOAD = """
import json, sys, time
import maskopt.models
from maskopt.models.heap import peak_bytes
from transformers import AutoConfig, AutoModelForCausalLM, logging
logging.set_verbosity_error()
config = AutoConfig.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_config(type(getattr(config, "dense", config))(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
))
before, began = peak_bytes("cpu"), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for parameter in model.parameters():  # those of a dense folder are read from the file only when they are looked at
    parameter.detach().view(-1)[::512].sum().item()
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": peak_bytes("cpu") - before, "type": str(model.dtype)}))
"""


def fresh(code: str, *arguments: str) -> dict[str, Any]:
    """Run code in a process of its own, and return the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def fastest(repeats: int, code: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Return the run of the least time of several; what each writes goes to a folder of its own."""
    runs = []
    for number in range(repeats):
        places = [name.format(number) for name in arguments]
        runs.append(fresh(code, str(folder), *places))
    return min(runs, key=lambda run: run["seconds"])


def measured(model: str, calibration: str, sparsity: str, work: Path, repeats: int) -> dict[str, Any]:
    """Prune a model, pack it in both forms, and return the figures."""
    dense = work / "dense"
    options = ["--sparsity", sparsity, "--solver", "wanda", "--samples", "8", "--seqlen", "128", "--quiet"]
    command = [sys.executable, "-m", "maskopt", "prune", model, str(dense), "--calibration", calibration, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = {
        "model": Path(model).name,
        "sparsity": float(sparsity),
        "load": fastest(repeats, LOAD, dense),
    }
    for form in ("plain", "compressed"):
        packing = fastest(repeats, PACK, dense, str(work / f"{form}-{{}}"), form)
        found[form] = {**packing, "load": fastest(repeats, LOAD, work / f"{form}-0")}
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL,CALIBRATION")
    parser.add_argument("--sparsities", default="0.5,0.7")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each time")
    arguments = parser.parse_args()
    results = []
    for item in (f"{MODEL},{README}", *arguments.models):
        model, calibration, *_ = item.split(",")  # other benchmarks take a text to evaluate on as well
        for sparsity in arguments.sparsities.split(","):
            with tempfile.TemporaryDirectory() as work:
                results.append(measured(model, calibration, sparsity, Path(work), arguments.repeats))
    head = ["model, type, sparsity", "dense MB", "pruned layers", "all weights", "compressed: pruned", "all"]
    head += ["pack s", "compress s", "load s", "packed", "compressed", "load MB", "packed", "compressed"]
    rows = []
    for one in results:
        forms = one["plain"], one["compressed"]
        layers = [form["kinds"]["mask and values"] for form in forms]
        ratios = [
            f"{value:.3f}"
            for layer, form in zip(layers, forms, strict=True)
            for value in (_ratio(layer), form["ratio"])
        ]
        loads = one["load"], *(form["load"] for form in forms)
        kind = one["load"]["type"].removeprefix("torch.")
        rows.append(
            [
                f"{one['model']}, {kind}, {100 * one['sparsity']:.0f} %",
                f"{forms[0]['dense_bytes'] / 1e6:.1f}",
                *ratios,
                *(f"{form['seconds']:.2f}" for form in forms),
                *(f"{load['seconds']:.2f}" for load in loads),
                *(f"{load['peak'] / 1e6:.0f}" for load in loads),
            ]
        )
    text = (
        "Bytes of weights in packed folders, in parts of the dense ones: of the pruned layers, and of all weights "
        "(embeddings and norms stay as they are, or are compressed). Seconds of packing, and seconds and peak memory "
        f"of loading the dense, the packed and the compressed folder, files cached; best of {arguments.repeats}.\n\n"
    )
    report.write("packing", "Packed folders", text + report.table(head, rows), {"results": results})


def _ratio(kind: dict[str, int]) -> float:
    return kind["packed"] / kind["dense"]


if __name__ == "__main__":
    main()
