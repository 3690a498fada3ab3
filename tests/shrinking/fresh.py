"""Loads folders of shrunk models in a process of its own and prints the outcomes.

    python fresh.py MODE FOLDER

FOLDER holds folders that `tests.shrinking.made.keep` wrote. MODE says who reads them: `maskopt` (imported before
transformers), `late` (imported after it), `code` (trust_remote_code, without maskopt) or `plain` (neither).
Prints a JSON object: for each folder "the same", or what differs or failed.
"""

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
if MODE == "maskopt":
    import maskopt
from transformers import AutoModelForCausalLM, logging  # noqa: E402

if MODE == "late":
    import maskopt  # noqa: F401

OPTIONS = {"trust_remote_code": True} if MODE == "code" else {}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **OPTIONS, **options)


@torch.no_grad()
def differs(model, expected, tolerance=0.0):
    """What a model computes otherwise than expected: nothing, the logits, or what it writes."""
    ids = expected["ids"]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(logits, expected["logits"], rtol=tolerance, atol=tolerance * expected["logits"].abs().max()):
        return f"logits, by {float((logits - expected['logits']).abs().max())}"
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return None if tolerance > 1e-4 or torch.equal(written, expected["written"]) else "writing"


def outcome(folder):
    expected = load_file(folder / "expected.safetensors")
    try:
        model, info = load(folder, output_loading_info=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        return f"weights are missing: {info}"
    if model.num_parameters() != json.loads((folder / "parameters.json").read_text()):
        return f"{model.num_parameters()} parameters"
    again = folder.with_name(f"{folder.name} saved again")
    model.save_pretrained(again)
    trials = {"loaded": model, "saved again": load(again), "copied": copy.deepcopy(model)}
    trials["on devices"] = load(folder, device_map="auto")
    trials["on one device"] = load(folder, device_map="cpu")
    trials["pickled"] = pickle.loads(pickle.dumps(model))
    trials["attention"] = load(folder)
    trials["attention"].set_attn_implementation("eager")
    trials["eager"] = load(folder, attn_implementation="eager")
    for name, each in trials.items():
        wrong = differs(each, expected, 1e-5 if name in ("attention", "eager") else 0.0)
        if wrong:
            return f"{name}: {wrong}"
    if {
        module.config._attn_implementation for module in trials["attention"].modules() if hasattr(module, "config")
    } != {"eager"}:
        return "attention: some blocks compute it as before"
    half = load(folder, dtype=torch.bfloat16)
    if {each.dtype for each in half.parameters()} != {torch.bfloat16}:
        return "half precision: parameters of another type"
    wrong = differs(half, expected, 0.2)
    return f"half precision: {wrong}" if wrong else "the same"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes = {path.name: outcome(path) for path in sorted(FOLDER.iterdir())}
    if MODE in ("code", "plain"):
        assert "maskopt" not in sys.modules
    print(json.dumps({"outcomes": outcomes}))
