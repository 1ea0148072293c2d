"""What a model knew after each step that its training kept.

tinytransformer train --config tiny --train.keep_at '[0, 100, 200]'
python -m benchmarks.history runs/tiny          writes benchmarks/results/history.json
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks import run
from tinytransformer.files import write_whole
from tinytransformer.history import learning_history
from tinytransformer.runs import load_run

RESULTS = Path(__file__).parent / "results" / "history.json"


def rounded(value):
    "The same with four digits after the point; what is no number stays as it is."
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    torch.set_num_threads(1)
    rows = [json.dumps(rounded(row)) for row in learning_history(load_run(sys.argv[1]))]
    write_whole(RESULTS, "[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    run(main)
