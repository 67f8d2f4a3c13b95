"""Files of weights without a folder, and folders of more than one format: read as the format that the user names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.sae import SAE
from shared.sae.__main__ import main, settings_of
from shared.sae.loading import convert, load, load_any
from tests.foreign import foreign_weights, write_dictionary_learning, write_gemma_scope, write_saelens
from tests.formulas import FORMULAS, D, F, K, activations, assert_same


def weights(enc_FD: bool = True, dec_FD: bool = True, linear: bool = False) -> dict[str, torch.Tensor]:
    w = foreign_weights()
    if linear:
        return {"encoder.weight": w["encoder.weight"], "encoder.bias": w["encoder.bias"],
                "decoder.weight": w["W_dec"].T.contiguous(), "decoder.bias": w["b_dec"]}  # fmt: skip
    enc, dec = w["encoder.weight"], w["W_dec"]
    return {"W_enc": enc if enc_FD else enc.T.contiguous(), "b_enc": w["encoder.bias"],
            "W_dec": dec if dec_FD else dec.T.contiguous(), "b_dec": w["b_dec"]}  # fmt: skip


def by_hand(x: torch.Tensor, activation: str, pre_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [N, F], reconstruction [N, D]), dense."""
    w = foreign_weights()
    z = (x - w["b_dec"] if pre_bias else x) @ w["encoder.weight"].T + w["encoder.bias"]
    if activation == "topk":
        f = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values).clamp_min(0)
    else:
        f = z.clamp_min(0) if activation == "relu" else z * (z > 15.0)
    return f, f @ w["W_dec"] + w["b_dec"]


FORMS: list[Any] = [(True, True), (False, True), (True, False), (False, False), "linear", "nested"]


@pytest.mark.parametrize("ending", ["pt", "safetensors", "npz"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("activation", "pre_bias"), [("topk", True), ("relu", False), ("jumprelu", True)])
def test_a_plain_file(tmp_path: Path, ending: str, form: Any, activation: str, pre_bias: bool) -> None:
    tensors = weights(linear=form == "linear") if isinstance(form, str) else weights(*form)
    path = tmp_path / f"sae.{ending}"
    given: dict[str, Any] = {"activation": activation, "pre_bias": pre_bias}
    given |= {"topk": {"k": K}, "jumprelu": {"threshold": 15.0}, "relu": {}}[activation]
    if ending == "pt":
        nested = {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}, **given}
        torch.save(nested if form == "nested" else tensors, path)
        given = {} if form == "nested" else given
    elif ending == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file(tensors, path)
    assert convert(path, tmp_path / "ours", "granary", reads_as="plain", given=given) == "plain"
    x = activations()
    assert_same(load(tmp_path / "ours"), *by_hand(x, activation, pre_bias), x)


def test_the_file_of_a_format(tmp_path: Path) -> None:
    x = activations()
    write_dictionary_learning(tmp_path / "theirs", "BatchTopKSAE")
    (tmp_path / "moved.pt").write_bytes((tmp_path / "theirs/ae.pt").read_bytes())
    given = {"trainer": {"dict_class": "BatchTopKSAE"}}
    sae, _ = load_any(tmp_path / "moved.pt", reads_as="dictionary_learning", given=given)
    assert_same(sae, *FORMULAS["dictionary_learning"](tmp_path / "theirs", x), x)
    write_gemma_scope(tmp_path / "gemma", 1)
    (tmp_path / "gemma.npz").write_bytes((tmp_path / "gemma/params.npz").read_bytes())
    sae, _ = load_any(tmp_path / "gemma.npz", reads_as="gemma_scope")
    assert_same(sae, *FORMULAS["gemma_scope"](tmp_path / "gemma", x), x)
    write_saelens(tmp_path / "lens")
    save_file(weights(), tmp_path / "lens/params.safetensors")  # as Gemma Scope's are called
    sae, _ = load_any(tmp_path / "lens", reads_as="saelens")
    assert_same(sae, *FORMULAS["saelens"](tmp_path / "lens", x), x)


def test_what_is_not_said_or_not_known_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    told = {"activation": "relu", "pre_bias": True}

    def refused(match: str, content: dict[str, Any], as_: str | None = "plain", **given: Any) -> None:
        torch.save(content, path)
        with pytest.raises(GranaryError, match=match) as caught:
            load_any(path, reads_as=as_, given=given)
        assert "\n" not in str(caught.value)

    refused("is a file, not the folder of an SAE: say what it is by --as FORMAT, one of saelens", weights(), None)
    refused(r"--as playn \(did you mean plain\?\): choose from saelens, .*, plain", weights(), "playn")
    refused("does not say its activation: give --set activation= one of topk", weights())
    refused("whether b_dec is taken off the input", weights(), activation="relu")
    refused("lacks the key k", weights(), activation="topk", pre_bias=True)
    refused("the tensor mean", {**weights(), "mean": torch.zeros(D)}, **told)
    refused("the key subtract_mean", {"state_dict": weights(), "subtract_mean": True}, **told)
    refused("the key learning_rate", weights(), **told, learning_rate=1)
    refused("--set activation=relu: .* has activation='topk'", {"state_dict": weights(), "activation": "topk"}, **told)
    refused("none of W_dec, decoder.weight", {k: v for k, v in weights().items() if k != "W_dec"}, **told)
    refused("W_enc has shape", {**weights(), "W_enc": torch.zeros(F, D + 1)}, **told)
    square = {"W_enc": torch.eye(D), "b_enc": torch.zeros(D), "W_dec": torch.eye(D), "b_dec": torch.zeros(D)}
    refused("W_enc is square, so its orientation can't be told", square, **told)
    with pytest.raises(GranaryError, match=r"sae\.pt is a file, not the folder of an SAE: .*convert .* --as FORMAT"):
        SAE.from_pretrained(path)
    with pytest.raises(GranaryError, match="reads one file of weights"):
        load_any(tmp_path, reads_as="plain")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights(enc_FD=False), tmp_path / "sae.pt")
    settings = [text for one in ("activation=topk", f"k={K}", "pre_bias=true") for text in ("--set", one)]
    new = tmp_path / "new"
    main(["convert", str(tmp_path / "sae.pt"), str(new), "--to", "granary", "--as", "plain", *settings])
    assert capsys.readouterr().out.strip().endswith("plain to granary")
    assert load(new).config.k == K
    with pytest.raises(SystemExit):
        main(["convert", str(new), str(tmp_path / "x"), "--to", "sae_lens"])
    assert "'sae_lens' can't be written (did you mean saelens?)" in capsys.readouterr().err
    assert settings_of(["a.b=1", "a.c=x", "d=true"]) == {"a": {"b": 1, "c": "x"}, "d": True}
    for wrong in ("k", "=1", "a.=1"):
        with pytest.raises(GranaryError, match="write KEY=VALUE"):
            settings_of([wrong])
