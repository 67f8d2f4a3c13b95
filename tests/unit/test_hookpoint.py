"""Names of hooks and lists of layers."""

import pytest

from shared.errors import GranaryError
from shared.hookpoint import SITES, HookPoint, hook_points, parse_layers


@pytest.mark.parametrize("site", SITES)
def test_name_and_back(site: str) -> None:
    hook = HookPoint(16, site)
    assert HookPoint.parse(str(hook)) == hook
    assert str(hook) == f"layers.16.{site}"
    assert hook.key == f"layers/16/{site}"


@pytest.mark.parametrize("name", ["layers.2", "layers.2.resid", "2.resid_post", "layers.-1.resid_post", ""])
def test_a_wrong_name_says_what_to_write(name: str) -> None:
    with pytest.raises(GranaryError, match=r"hook"):
        HookPoint.parse(name)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", [0, 1, 2, 3, 4, 5, 6, 7]), ("3", [3]), ("4,0", [0, 4]), ("2-4", [2, 3, 4]), ("0,2-3, 7", [0, 2, 3, 7])],
)
def test_layers(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 8) == layers


@pytest.mark.parametrize(
    ("text", "reason"), [("8", "has 8 layers"), ("3-1", "backwards"), ("a", "write all"), ("", "write all")]
)
def test_wrong_layers(text: str, reason: str) -> None:
    with pytest.raises(GranaryError, match=reason):
        parse_layers(text, 8)


def test_hook_points_are_in_layer_order() -> None:
    names = [str(hook) for hook in hook_points("3,1", ["mlp_in", "mlp_out"], 4)]
    assert names == ["layers.1.mlp_in", "layers.1.mlp_out", "layers.3.mlp_in", "layers.3.mlp_out"]
