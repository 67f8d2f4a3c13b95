"""A graph's memory: planned for a model of 8 B parameters from shapes alone, and the plan against what is taken."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig

from shared.bundled import MODEL_DIR
from tests.cli import ForkServer
from tests.hollow import hollow_safetensors

ROOT = Path(__file__).resolve().parents[2]
WIDTH, LAYERS, LATENTS = 4096, 32, 131_072


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """Llama-3.1-8B's shape and 32 transcoders in circuit-tracer's format, 150 GB that lie nowhere."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=WIDTH, intermediate_size=14_336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=8, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path / "model")
    hollow_safetensors(tmp_path / "model/model.safetensors", {"weights": (8_030_261_248,)}, "BF16", 2)
    (tmp_path / "tc").mkdir()
    places = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    document = {"model_name": "model", "model_kind": "transcoder_set", "scan": "it", **places}
    (tmp_path / "tc/config.yaml").write_text(json.dumps(document))
    rows, vectors = (LATENTS, WIDTH), {"b_enc": (LATENTS,), "b_dec": (WIDTH,)}
    for layer in range(LAYERS):
        hollow_safetensors(tmp_path / f"tc/layer_{layer}.safetensors", {"W_enc": rows, "W_dec": rows, **vectors})
    return tmp_path


def test_f46_a_dry_run_plans_an_8b_model_from_headers(stages: ForkServer, llama_8b: Path) -> None:
    """What it reads are headers and configurations: there is nothing else in the files."""
    done = stages.run(
        "stage_trace", f"{llama_8b}/tc", f"model={llama_8b}/model", "model.dtype=bfloat16", "text=The capital is",
        f"out_dir={llama_8b}/out", "max_features=4096", "dry_run=true",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    told = re.search(r"([\d.]+) GB at the peak \(model ([\d.]+) GB", done.stdout + done.stderr)
    assert told is not None, done.stderr
    assert float(told[2]) == pytest.approx(2 * 8.030, rel=1e-2)
    assert 18 < float(told[1]) < 24  # one encoder, 3.2 GB with its copy, and no decoder beside the model


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    ["many rows", "a large batch", "a wide dictionary", "a large model", "a CLT", "attention too", "8B, scaled down"],
)
def test_the_peak_is_within_a_tenth_of_the_plan(shape: str) -> None:
    """In processes of their own; where decoders are most of what lies on disk, less than they are is taken."""
    command = [sys.executable, "benchmarks/trace_memory.py", "--only", shape]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    told = re.search(rf"{shape}: .*, ([\d.]+) of the plan, ([\d.]+) of the decoders", done.stdout)
    assert told is not None, done.stdout
    print(told[0])  # noqa: T201
    assert 0.9 <= float(told[1]) <= 1.1
    if shape.startswith("8B"):
        assert float(told[2]) < 0.7
