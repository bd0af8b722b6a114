"""A copy of a model that computes the same, with activations as large models have them: `outlier_copy.py FROM OUT [FACTOR]`.

In:  a Hugging Face folder. Out: another, whose norms and up projections have a few columns FACTOR (128) times as large, and
whose next layers' columns are smaller by as much. INT8 has something to lose on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd.demo.outliers import add_outliers


def main() -> None:
    """Write the copy."""
    if len(sys.argv) not in (3, 4):
        sys.exit(f"found {len(sys.argv) - 1} words, expected FROM OUT [FACTOR]")
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    factor = float(sys.argv[3]) if len(sys.argv) == 4 else 128.0
    model = add_outliers(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), factor)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main()
