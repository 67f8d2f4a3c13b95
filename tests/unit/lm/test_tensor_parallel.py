"""Which models transformers' plans split, and that a sharded class is read like the model's own."""

from typing import Any

import pytest
import torch
from transformers import AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping

from shared.basics.errors import GranaryError
from shared.lm.tensor_parallel import check_tensor_parallel, sharded_class
from tests.picture_models import FAMILIES, tokenizer


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    made = tokenizer()
    configs = {family: make(made)[0] for family, make in FAMILIES.items()}
    for config in configs.values():
        config.get_text_config().update({"num_key_value_heads": 2})
    return configs


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_the_text_stack_of_a_vision_language_model_is_split(configs: dict[str, Any], family: str) -> None:
    check_tensor_parallel(configs[family], 2)
    with pytest.raises(GranaryError, match="tensor_parallel=3 does not divide the model's 2 key/value heads"):
        check_tensor_parallel(configs[family], 3)


def test_a_text_stack_without_a_plan_is_refused(configs: dict[str, Any]) -> None:
    check_tensor_parallel(configs["qwen3_vl"], 1)
    with pytest.raises(GranaryError, match="no tensor-parallel plan for qwen3_vl_text: use tensor_parallel=1"):
        check_tensor_parallel(configs["qwen3_vl"], 2)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_sharded_class_renames_what_files_hold_as_the_model_does(configs: dict[str, Any], family: str) -> None:
    """Else files written by the whole model lack every weight of the text stack."""
    config = configs[family]
    plain = AutoModel._model_mapping[type(config)]
    with torch.device("meta"):
        wanted, found = (
            get_model_conversion_mapping(cls(config))
            for cls in (plain, sharded_class(plain, None))  # type: ignore[arg-type]
        )
    assert wanted
    assert [one.source_patterns for one in found] == [one.source_patterns for one in wanted]
