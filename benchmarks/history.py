"""What a model knew after each step that its training kept.

OMP_NUM_THREADS=1 tinytransformer train --config tiny --train.keep_at '[0, 50, 100, 150, 200, 250,
300, 350, 400, 420, 440, 460, 480, 500, 550, 600, 700, 800, 900, 1000, 1200, 1400, 1600]'
python -m benchmarks.history runs/tiny          writes benchmarks/results/history.json
python -m benchmarks.history --pack runs/tiny   writes runs/tiny/history.bin
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import run
from tinytransformer.files import write_whole
from tinytransformer.history import learning_history, pack_history
from tinytransformer.runs import load_run

RESULTS = Path(__file__).parent / "results" / "history.json"
STEPS = [0, 100, 200, 300, 400, 440, 480, 600, 1000]  # that are shipped


def rounded(value):
    "The same with four digits after the point; what is no number stays as it is."
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run of TinyWiki that was trained with keep_at")
    parser.add_argument("--pack", action="store_true", help="pack the weights of some steps")
    given = parser.parse_args()
    if given.pack:
        rows = json.loads(RESULTS.read_text())
        packed = pack_history(load_run(given.run), STEPS, rows)
        write_whole(Path(given.run) / "history.bin", packed.to_bytes())
        return
    torch.set_num_threads(1)
    rows = [json.dumps(rounded(row)) for row in learning_history(load_run(given.run))]
    write_whole(RESULTS, "[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    run(main)
