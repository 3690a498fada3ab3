"""Loads packed folders in a process of its own, with the transformers that is installed there, and prints the outcomes.

    python fresh.py MODE FOLDER

FOLDER holds dense folders and, under the same name with `-packed`, packed ones. MODE says who reads them: `maskopt`
(imported before transformers), `late` (imported after it), `code` (trust_remote_code, without maskopt) or `nobody`.
Prints a JSON object: the version of transformers, and for each folder "the same bits", or what differs or failed.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
if MODE == "maskopt":
    import maskopt
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

if MODE == "late":
    import maskopt  # noqa: F401

WORDS = {2: torch.int16, 4: torch.int32}


def state(folder, **options):
    return {
        name: value.contiguous().view(WORDS[value.dtype.itemsize])
        for name, value in AutoModelForCausalLM.from_pretrained(folder, **options).state_dict().items()
    }


def differing(one, two):
    if one.keys() != two.keys():
        return f"names differ: {sorted(one.keys() ^ two.keys())}"
    return next((name for name in one if not torch.equal(one[name], two[name])), None)


def outcome(dense):
    packed = dense.with_name(f"{dense.name}-packed")
    try:
        expected = state(dense)
    except Exception as error:
        return f"the dense folder does not load: {error}"
    try:
        model = AutoModelForCausalLM.from_pretrained(packed, **({"trust_remote_code": True} if MODE == "code" else {}))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = {name: value.contiguous().view(WORDS[value.dtype.itemsize]) for name, value in model.state_dict().items()}
    wrong = differing(expected, found)
    if wrong:
        return f"loaded wrongly: {wrong}"
    # What is saved again is a plain folder, which needs neither maskopt nor code.
    again = dense.with_name(f"{dense.name}-{MODE}-{transformers.__version__}")
    model.save_pretrained(again)
    config = json.loads((again / "config.json").read_text())
    wrong = differing(expected, state(again))
    if wrong or config["model_type"] == "maskopt-packed" or "auto_map" in config or [*again.glob("*.py")]:
        return f"saved wrongly: {wrong or config}"
    return "the same bits"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folders = sorted(path for path in FOLDER.iterdir() if (FOLDER / f"{path.name}-packed").is_dir())
    outcomes = {path.name: outcome(path) for path in folders}
    if MODE in ("code", "nobody"):
        assert "maskopt" not in sys.modules
    print(json.dumps({"transformers": transformers.__version__, "outcomes": outcomes}))
