"""From a text to the tokens of a prompt, and which of its positions no dictionary was taught."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.lm.tokenizer import special_ids

log = logging.getLogger(__name__)


def encode(text: str | Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Token ids with the tokenizer's BOS first where it has one, and the text without it.

    Ids that are given are taken as they are, with a warning where they lack BOS: models behave otherwise without.
    Raises GranaryError for a prompt of no tokens, for ids outside the vocabulary, and for a text that spells BOS out.
    """
    bos = special_ids(tokenizer).bos
    if not isinstance(text, str):
        ids = [int(one) for one in text]
        if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
            raise GranaryError(f"the prompt has token ids outside the tokenizer's {len(tokenizer)}: check its ids")
        if bos is not None and ids[:1] != [bos]:
            log.warning("the prompt does not begin with BOS (%d), which the model was trained to see first", bos)
        said = str(tokenizer.decode(ids[1:] if ids[:1] == [bos] else ids))
    else:
        ids, said = list(tokenizer(text, add_special_tokens=False).input_ids), text
        if bos is not None and ids[:1] == [bos]:
            raise GranaryError("the text begins with BOS, which is put before it anyway: leave it out")
        ids = ids if bos is None else [bos, *ids]
    if len(ids) <= int(bos is not None and ids[:1] == [bos]):
        raise GranaryError('the prompt holds no token: give text="..." something to say')
    return ids, said


def fixed_positions(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, first: int | None = None) -> Tensor:
    """bool [T]: where an MLP's output is taken as it is. By the rule that decides what a harvest trains on.

    Special tokens, wherever they stand; and the first position where there is no BOS. With `first`: so many positions
    from the start instead, and special tokens.
    """
    special = special_ids(tokenizer)
    fixed_T = torch.isin(torch.tensor(list(ids)), torch.tensor(special.all, dtype=torch.int64))
    first = int(special.bos is None) if first is None else first
    if first < 0:
        raise GranaryError(f"fixed={first}: a number of positions is not negative")
    fixed_T[:first] = True
    return fixed_T
