"""No rank ever holds more of a model than its part: weights go from the file straight to their shard.

The model has a large LLaMA's proportions at 1/8 of Llama-3-70B's width and 10 of its layers, of which the deepest hook
needs 8: what is not needed is not loaded either.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.harvesting import ENVIRONMENT

WORKER = Path(__file__).with_name("memory_worker.py")
LAYERS, NEEDED = 10, 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """Folder; bytes of the needed layers, which are sharded; bytes of the embedding, which each rank has."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    llama = LlamaForCausalLM(config)  # float32, loaded as bfloat16: what a rank keeps is allocated, not mapped
    layer = sum(2 * p.numel() for p in llama.model.layers[0].parameters())
    embedding = 2 * llama.model.embed_tokens.weight.numel()
    llama.save_pretrained(folder)
    return folder, NEEDED * layer, embedding


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_peak_memory_of_a_rank_is_its_part(model: tuple[Path, int, int], tp: int) -> None:
    folder, layers, embedding = model
    launch = [sys.executable, "-m", "shared.launch.torchrun", "--standalone", f"--nproc-per-node={tp}"]
    command = [*launch, str(WORKER), str(folder), str(NEEDED)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    peaks = [int(peak) for peak in re.findall(r"peak (\d+)", run.stdout)]
    assert len(peaks) == tp
    part = layers / tp + embedding
    print(f"tp {tp}: the whole {(layers + embedding) / 1e6:.0f} MB, the part {part / 1e6:.0f} MB, peaks {peaks}")  # noqa: T201
    # Beside the part: one weight on its way, threads' stacks, libraries that the first forward initialises.
    slack = 60e6
    assert all(0.9 * part < peak < part + slack for peak in peaks), (part, peaks)
    assert tp == 1 or max(peaks) < 0.75 * (layers + embedding)
