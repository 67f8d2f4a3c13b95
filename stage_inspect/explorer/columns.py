"""The columns of the table of all latents, as a reader sees them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One number per latent: how it is called, written and sent."""

    name: str
    title: str
    help: str
    kind: str
    """count, share or number."""
    shown: bool = False
    """In the table before the reader chooses."""
    listed: bool = True
    """Among those that the reader can choose."""


COLUMNS = (
    Column("density", "Density", "share of the tokens on which it fires", "share", shown=True),
    Column("fired", "Tokens", "tokens on which it fires", "count"),
    Column("max", "Maximum", "its largest activation", "number", shown=True),
    Column("mean", "Mean", "mean activation where it fires", "number", shown=True),
    Column("std", "Deviation", "standard deviation of the activation where it fires", "number"),
    Column("skew", "Skew", "skew of the activation where it fires", "number"),
    Column("kurtosis", "Kurtosis", "excess kurtosis of the activation where it fires", "number"),
    Column("documents", "Documents", "documents in which it fires", "count", shown=True),
    Column("contexts", "Contexts", "contexts in which it fires", "count"),
    Column("windows", "Windows", "windows in which it fires", "count"),
    Column("encoder_decoder_cosine", "Enc · dec", "cosine between its encoder and its decoder direction", "number"),
    Column("encoder_norm", "Encoder norm", "norm of its encoder direction", "number"),
    Column("decoder_norm", "Decoder norm", "norm of its decoder direction", "number"),
    Column("bias", "Bias", "its encoder bias", "number"),
    Column("logit_sd", "Logit spread", "standard deviation of its logit weights over the vocabulary", "number"),
    Column("logit_skew", "Logit skew", "skew of its logit weights over the vocabulary", "number"),
    Column("logit_kurtosis", "Logit kurtosis", "excess kurtosis of its logit weights: a few tokens stand out", "number",
           shown=True),
    Column("image_share", "On images", "share of its firing that is on regions of images", "share", shown=True),
    Column("assistant_share", "On answers", "share of its firing that is on what the assistant said", "share"),
    Column("map_x", "x", "place on the map", "number", listed=False),
    Column("map_y", "y", "place on the map", "number", listed=False),
)  # fmt: skip
# Of the notes, not of the table: there where rules were looked for.
RULE_F1 = Column(
    "rule_f1", "Rule F1", "how well its best rule tells, on other documents, where it fires", "number", shown=True
)
