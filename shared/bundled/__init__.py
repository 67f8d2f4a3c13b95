"""A small LLaMA and its corpus, both in the box, for demonstrations and tests that must not download anything."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Hugging Face folder of the bundled model; `make_model.py` beside it made it, its README.md is the model card."""
