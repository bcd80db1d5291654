"""Sequences that hold more of some key tokens count more in the loss.

    key_tokens = load_key_tokens("keys.txt")    # one token a line: `river`, ` river`, ...
    weights = key_token_weights(x, key_tokens, alpha=1.0)       # (B,), constants in the backward
    _, loss = model(x, y, weights=weights)

    weight_b = alpha * (1 + how many tokens of sequence b are key tokens)
    loss     = mean over the batch of weight_b * (mean cross entropy of sequence b)

This is the weighted loss of the Hugging Face course, chapter "Training a causal language model from
scratch", which favours examples that use certain libraries. The weights are not normalised: the
loss is no longer in nats per token, and alpha also scales the gradient (before clipping).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError
from pretrain.tokens.tokenizer import load_encoding

if TYPE_CHECKING:  # flags are checked, and --help answered, without torch
    from torch import Tensor


class KeyTokenError(UserError):
    """A file of key tokens that cannot be used; the message is one line for the user."""


def key_token_weights(inputs: "Tensor", key_tokens: "Tensor", alpha: float = 1.0) -> "Tensor":
    """inputs int64 (B, T), key_tokens int64 (K,) of distinct ids -> float32 (B,) on the device of
    `inputs`.

    An occurrence counts whenever it comes, so a sequence that holds a key token n times has n of
    them.
    """
    import torch

    found = torch.isin(inputs, key_tokens.to(inputs.device))
    return alpha * (1.0 + found.sum(dim=1, dtype=torch.float32))


def load_key_tokens(path: str | Path) -> "Tensor":
    """read_key_tokens as int64 (K,)."""
    import torch

    return torch.tensor(read_key_tokens(path))


def read_key_tokens(path: str | Path) -> list[int]:
    """The ids of a UTF-8 file with the text of one GPT-2 token a line, sorted, each once.

    White space counts: ` river` and `river` are two tokens. Empty lines are left out. Raises
    KeyTokenError when the file cannot be read or holds no token, and for lines that are not a
    single token.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeyTokenError(f"{path}: cannot be read: {reason}") from None
    encoding = load_encoding()
    encoded = [
        (number, line, encoding.encode_ordinary(line))
        for number, line in enumerate(lines, 1)
        if line
    ]
    wrong = [
        f"line {number} {line!r} is {len(ids)} tokens"
        for number, line, ids in encoded
        if len(ids) > 1
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise KeyTokenError(
            f"{path}: {', '.join(wrong[:3])}{more}; each line must be one token of GPT-2"
        )
    if not encoded:
        raise KeyTokenError(f"{path}: holds no token; write the text of one token on each line")
    return sorted({ids[0] for _, _, ids in encoded})
