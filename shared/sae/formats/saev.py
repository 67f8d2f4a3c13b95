"""saev (OSU-NLP-Group): one file ``sae.pt``, a line of JSON and behind it what torch saved of the tensors. Read only.

    {"schema": 5, "cfg": {"d_model": ..., "d_sae": ..., "activation": {"cls": ..., "params": {...}}, ...}, ...}

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec, for BatchTopK activation.threshold.

    z = x W_enc + b_enc;   y = f W_dec + b_dec
    Relu        f = relu(z)
    TopK        f = the k largest z, be they negative
    BatchTopK   f = z where z > threshold (0 where that is less)

Before schema 2 some versions took b_dec off the input and some did not, and before there was a threshold BatchTopK
chose k per row or by the batch: what the file does not say is given by ``--set``.
"""

from pathlib import Path
from typing import Any

import torch

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source, Tensors, merged

WEIGHTS = "sae.pt"
LONGEST_HEADER = 1 << 20
LAST_SCHEMA, FIRST_WITHOUT_PRE_BIAS = 5, 2
HEADER = ("cls", "commit", "lib")
# Of the configuration, what is about training alone.
TRAINING = (
    "ghost_grads", "l1_coeff", "n_reinit_samples", "normalize_w_dec", "reinit_blend", "reinit_enc_dec_tranpose",
    "remove_parallel_grads", "seed", "sparsity_coeff", "use_ghost_grads",
)  # fmt: skip
OF_ACTIVATION = ("aux", "key", "kind", "momentum", "sparsity")


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    path = folder / WEIGHTS
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"{"


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for a schema that is not known, and for what early ones do not say."""
    path = source.weights(WEIGHTS)
    header, offset = read_header(path)
    schema = header.get("schema", 0)
    if schema not in range(LAST_SCHEMA + 1):
        raise GranaryError(f"{path} has schema={schema!s:.20}: 1 to {LAST_SCHEMA}, and none, can be read")
    top = source.document(merged(header, source.given, path), path, HEADER if schema else TRAINING)
    cfg = source.document(top.mapping("cfg"), path, TRAINING) if schema and top.get("schema") else top
    pre_bias = top.flag("pre_bias", False)
    if schema < FIRST_WITHOUT_PRE_BIAS and top.get("pre_bias") is None:
        raise GranaryError(
            f"{path} is of an early version, which does not say whether b_dec is taken off the input: give --set"
            " pre_bias=true or false"
        )
    tensors = source.pickled(WEIGHTS, offset=offset)
    d, f = tensors.matrix("W_enc")
    check_sizes(cfg, d, f)
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = tensors.take(
        {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    )
    return RawDictionary(
        W_enc_DF.T,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        pre_bias=pre_bias,
        **activation_of(source, top, cfg, tensors, f),
        provenance={"converted_from": "saev", "source": header},
    )


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON object of the first line, and where the tensors begin."""
    try:
        with path.open("rb") as file:
            line = file.readline(LONGEST_HEADER)
    except OSError as error:
        raise GranaryError(f"{path} can't be read: {error.strerror or error}") from None
    header = parse_json(line, path)
    if not isinstance(header, dict):
        raise GranaryError(f"{path} does not begin with a JSON object")
    return header, len(line)


def check_sizes(cfg: Document, d: int, f: int) -> None:
    """Raise GranaryError where the configuration has other sizes than the tensors."""
    width = "d_vit" if "d_vit" in cfg.content else "d_model"
    told = {width: (cfg.whole(width), d)}
    if cfg.get("d_sae") is not None:
        told["d_sae"] = (cfg.whole("d_sae"), f)
    elif cfg.get("exp_factor") is not None:
        told["exp_factor"] = (cfg.whole("exp_factor") * d, f)
    for name, (said, found) in told.items():
        if said != found:
            raise GranaryError(f"{cfg.where}: {name} makes {said}, its tensors have {found}")


def activation_of(source: Source, top: Document, cfg: Document, tensors: Tensors, f: int) -> dict[str, Any]:
    """The activation and what it needs, as fields of a RawDictionary."""
    told = cfg.mapping("activation")
    if told:
        activation = source.document(told, cfg.where)
        name, params = activation.text("cls"), source.document(activation.mapping("params"), cfg.where, OF_ACTIVATION)
    elif top.get("schema") not in (None, 1):
        raise GranaryError(f"{cfg.where} lacks the key activation")
    else:  # in the first schema ``cls`` may be the activation; before it there was ReLU alone
        told_cls = None if top.get("schema") is None else top.text("cls")
        name, params = ("Relu" if told_cls in (None, "SparseAutoencoderConfig") else told_cls), cfg
    match name:
        case "Relu":
            return {"activation": "relu"}
        case "TopK":
            return {"activation": "signed_topk", "k": min(params.whole("top_k"), f)}
        case "BatchTopK":
            if "activation.threshold" in tensors:
                threshold = tensors.scalar("activation.threshold")
            elif top.get("threshold") is not None:
                threshold = top.number("threshold")
            else:
                raise GranaryError(
                    f"{cfg.where} has BatchTopK without a threshold, so what it computes depends on the batch: give"
                    " --set threshold=NUMBER"
                )
            return {
                "activation": "batchtopk",
                "k": min(params.whole("top_k"), f),
                "threshold_F": torch.full((f,), threshold),
            }
    raise GranaryError(f"{cfg.where} has the activation {name!s:.40}: Relu, TopK and BatchTopK can be read")
