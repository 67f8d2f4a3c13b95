"""SAEDashboard's own class reads what is exported, and gives the same back.

Only the one module is loaded, by its path: the package's pins do not go with those of the other peers.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stage_inspect.export.__main__ import main
from tests.latents import synthetic_latents

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def dashboard() -> Any:
    package = importlib.util.find_spec("sae_dashboard")
    if package is None or not package.submodule_search_locations:
        pytest.skip("SAEDashboard is not installed: make setup-peers")
    path = Path(package.submodule_search_locations[0]) / "neuronpedia" / "neuronpedia_dashboard.py"
    spec = importlib.util.spec_from_file_location("neuronpedia_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_its_class_reads_every_batch(dashboard: Any, tmp_path: Path) -> None:
    latents = synthetic_latents(tmp_path / "latents", 140)
    main([latents.url, str(tmp_path / "out"), "--to", "saedashboard", "--source", "2-set"])
    batches = sorted((tmp_path / "out").glob("batch-*.json"))
    assert len(batches) == 2
    for batch in batches:
        record = json.loads(batch.read_text())
        read = dashboard.NeuronpediaDashboardBatch(**record)
        assert json.loads(json.dumps(read.to_dict())) == record
