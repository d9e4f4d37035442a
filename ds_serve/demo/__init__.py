"""The demo model that ships with ds_serve: a tiny Llama for trying the server without a download.

Knows where the model folder lies and nothing else; imports neither torch nor transformers. The command line
and the tests call it. The model is made by `scripts/train_demo.py`; its card is `model/README.md`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> str:
    """The folder of the demo model, as a path that `from_pretrained` and `ds-serve serve` take.

    Raises FileNotFoundError if the installation lacks the weights.
    """
    folder = Path(__file__).resolve().parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo model's weights are missing from {folder}: reinstall ds_serve, "
            f"or make them with scripts/train_demo.py --out {folder}"
        )
    return str(folder)
