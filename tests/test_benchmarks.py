"""The benchmarks run; how fast is not asked here."""
import subprocess, sys

from conftest import ROOT


def test_quick():
    "Every kind of case, beside the one peer that is always installed."
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--quick", "--threads", "1"], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for row in ("| quick training | tinytransformer |", "| quick training | transformers |", "| quick generation | tinytransformer |", "| quick generation | transformers |",
                "| start | tinytransformer --help |", "| tokenizing for tiny | as prepare does it |", "| products | bf16 |", "| scale | both |"): assert row in done.stdout, row
