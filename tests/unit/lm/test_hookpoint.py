"""Names of hooks and lists of layers."""

import pytest

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import SITES, HookPoint, describe_hooks, hook_points, parse_layers


@pytest.mark.parametrize("site", SITES)
def test_name_and_back(site: str) -> None:
    hook = HookPoint(16, site)
    assert HookPoint.parse(str(hook)) == hook
    assert str(hook) == f"layers.16.{site}"


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


@pytest.mark.parametrize(
    ("layers", "sites", "line"),
    [
        ("2", ["resid_post"], "layers.2.resid_post"),
        (
            "0,1",
            ["resid_post", "mlp_out"],
            "layers.0.resid_post, layers.0.mlp_out, layers.1.resid_post, layers.1.mlp_out",
        ),
        ("all", ["resid_post", "mlp_out"], "resid_post, mlp_out of layers 0-31"),
        ("0-3,7,9-10", ["mlp_in"], "mlp_in of layers 0-3,7,9-10"),
    ],
)
def test_many_hooks_are_one_short_line(layers: str, sites: list[str], line: str) -> None:
    assert describe_hooks(hook_points(layers, sites, 32)) == line


def test_sites_at_different_layers_are_told_apart() -> None:
    hooks = [*hook_points("0-4", ["mlp_in"], 8), *hook_points("1", ["mlp_out", "resid_pre"], 8)]
    assert describe_hooks(hooks) == "mlp_in of layers 0-4; mlp_out, resid_pre of layers 1"
