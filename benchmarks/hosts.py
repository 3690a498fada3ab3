"""Prune a model by llm-compressor, with its own modifiers and with ours, and by our own pipeline, side by side.

    python benchmarks/hosts.py MODEL CALIBRATION TEXT [--samples 64] [--seqlen 512] [--characters 100000]

To be run where llm-compressor is installed: `make hosts` makes such an environment. Every case is a process of its own,
one after the other, with 2:4 in all layers but embeddings and head; the windows are the same. Perplexity is of TEXT, by
`maskopt.models.perplexity`. Writes benchmarks/results/hosts.{md,json}.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report
import torch

CASES = {
    "llm-compressor, SparseGPT": ("theirs", "sparsegpt"),
    "llm-compressor, Wanda": ("theirs", "wanda"),
    "llm-compressor, ours (SparseGPT)": ("modifier", "sparsegpt"),
    "llm-compressor, ours (best)": ("modifier", "best"),
    "maskopt prune (SparseGPT)": ("pipeline", "sparsegpt"),
    "maskopt prune (best, default)": ("pipeline", "best"),
}


def run_case(kind: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune by one case, in this process."""
    from maskopt import NM
    from maskopt.models import calibration_batches, load_model, peak_bytes, perplexity, prune, read_text
    from maskopt.models.preparation import Propagate
    from maskopt.weights import make_weights

    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model)
    calibration = read_text(arguments.calibration)
    batches = calibration_batches(tokenizer, calibration, arguments.samples, arguments.seqlen, 1, 0)
    windows = torch.cat(list(batches))
    began, used = time.perf_counter(), time.process_time()
    if kind == "pipeline":
        propagate: Propagate = "corrected" if method == "best" else "pruned"
        prune(model, batches, NM(keep=2, group=4), make_weights(method), propagate=propagate)
    else:
        from datasets import Dataset
        from llmcompressor import oneshot

        data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=[_modifier(kind, method)],
            num_calibration_samples=len(windows),
            max_seq_length=arguments.seqlen,
        )
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    layers = [each.weight for name, each in model.named_modules() if name.endswith("_proj")]
    pruned = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    text = arguments.text.read_text(encoding="utf-8")[: arguments.characters]
    reached = perplexity(model.to(torch.float32), tokenizer, text, seqlen=arguments.seqlen)
    return {
        "perplexity": reached.perplexity,
        "sparsity": pruned,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": peak_bytes("cpu"),
    }


def _modifier(kind: str, method: str) -> Any:
    targets = {"targets": ["LlamaDecoderLayer"], "ignore": ["re:.*lm_head"]}
    if kind == "modifier":
        from maskopt.plugins.llm_compressor import MaskoptModifier

        return MaskoptModifier(sparsity=0.5, pattern="2:4", method=method, targets=targets["targets"])
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
    return modifier(sparsity=0.5, mask_structure="2:4", **targets)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--characters", type=int, help="of TEXT, from its beginning; all by default")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(run_case(*CASES[arguments.case], arguments)))
        return
    figures: dict[str, Any] = {}
    for case in CASES:
        run = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--case", case],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        figures[case] = json.loads(run.stdout.splitlines()[-1])
        print(case, figures[case], flush=True)
    rows = [
        [
            case,
            f"{each['perplexity']:.2f}",
            f"{each['sparsity']:.4f}",
            f"{each['processor_seconds']:.0f}",
            f"{each['peak_bytes'] / 1e6:.0f}",
        ]
        for case, each in figures.items()
    ]
    head = ["pruned by", "perplexity", "sparsity", "processor seconds", "peak memory, MB"]
    measured = "all" if arguments.characters is None else f"{arguments.characters:,} characters"
    about = (
        f"{Path(arguments.model).name}, 2:4, {arguments.samples} windows of {arguments.seqlen} tokens, one thread; "
        f"perplexity of {measured} of the text."
    )
    report.write("hosts", "Pruning by llm-compressor and by us", f"{about}\n\n{report.table(head, rows)}", figures)


if __name__ == "__main__":
    main()
