"""Kill `maskopt prune` at random times, resume it, and compare the output with that of a run that was left alone.

    python benchmarks/kills.py [MODEL,CALIBRATION] [--kills 50] [--seed 0]

Every run begins with --resume and is killed (SIGKILL, SIGTERM or SIGINT) at a random time until one ends by itself;
then another output is begun, until the number of kills is reached. Without a model it is the demo model. Times are
drawn within the duration of an undisturbed run. Writes benchmarks/results/kills.{md,json}.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

from maskopt.demo.run import MODEL

README = Path(__file__).parent.parent / "README.md"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def digest(folder: Path) -> str:
    """Return a hash of weights, masks and configuration."""
    names = ("model.safetensors", "masks.safetensors", "config.json")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL,CALIBRATION", default=f"{MODEL},{README}")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, text = arguments.model.split(",")
    draw = random.Random(arguments.seed)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)  # what is ignored here would be ignored by the runs as well
    counts = dict.fromkeys((number.name for number in SIGNALS), 0)
    different, left, failed, outputs, within = 0, 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(out: Path) -> "subprocess.Popen[bytes]":
            options = ["--pattern", "2:4", "--samples", "8", "--seqlen", "128", "--quiet", "--resume"]
            command = [sys.executable, "-m", "maskopt", "prune", model, str(out), "--calibration", text, *options]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        began = time.perf_counter()
        if start(folder / "whole").wait():
            raise SystemExit("the undisturbed run failed")
        longest = time.perf_counter() - began
        expected = digest(folder / "whole")
        while sum(counts.values()) < arguments.kills:
            out = folder / f"out{outputs}"
            outputs += 1
            while True:
                process = start(out)
                try:
                    failed += process.wait(timeout=draw.uniform(0.5, 1.05) * longest) != 0
                    break
                except subprocess.TimeoutExpired:
                    number = draw.choice(SIGNALS)
                    os.kill(process.pid, number)
                    process.wait()
                    counts[number.name] += 1
                    within += any(out.with_name(f"{out.name}.unfinished").glob("blocks/[0-9]*"))
            different += digest(out) != expected
            left += len([path for path in folder.iterdir() if path.name.startswith((f"{out.name}.", f".{out.name}"))])
    figures = {
        "kills": counts,
        "kills_with_finished_blocks": within,
        "outputs": outputs,
        "different": different,
        "left_over": left,
        "failed": failed,
    }
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    report.write(
        "kills",
        "Killed and resumed",
        f"{sum(counts.values())} kills ({words}), {within} of them with finished blocks on disk, on the way to "
        f"{outputs} outputs of {Path(model).name}: {different} outputs differ from that of an undisturbed run, {left} "
        f"files or folders were left over, {failed} resumed runs failed.",
        figures,
    )


if __name__ == "__main__":
    main()
