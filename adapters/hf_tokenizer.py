"""GPT-2's tokenizer for transformers, with the ids that the shards were made with.

    tokenizer = build_tokenizer(1024)
    tokenizer("Hello world")["input_ids"]       # [15496, 995]

It is made of the tokens of pretrain.tokens.tokenizer, so it needs no network where that needs none.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from adapters import require
from pretrain.tokens.tokenizer import (
    END_OF_TEXT,
    VOCAB_SIZE,
    merges_file,
    read_merges,
    shown_tokens,
    token_bytes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(block_size: int) -> "PreTrainedTokenizerFast":
    """A GPT2TokenizerFast whose ids are those of tiktoken's encode_ordinary, for any text.

    A literal <|endoftext|> is ordinary text too, as in training; end-of-text is eos_token_id. There
    is no pad token, as GPT-2 has none. block_size is where it truncates when asked to. Raises
    FrameworkMissing, TokenizerUnavailable.
    """
    require("transformers")
    from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]

    vocabulary, merges = _vocabulary_and_merges()
    # Its arguments vocab_file and merges_file are accepted and ignored: the tokenizer would be
    # empty.
    return GPT2TokenizerFast(
        vocab={**vocabulary, "<|endoftext|>": END_OF_TEXT},
        merges=list(merges),
        model_max_length=block_size,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path, block_size: int) -> None:
    """tokenizer.json, tokenizer_config.json, and vocab.json and merges.txt for tools that know only
    those."""
    tokenizer = build_tokenizer(block_size)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


@functools.cache
def _vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges as GPT-2's files write them, once for all tokenizers of a process."""
    try:
        return shown_tokens(), read_merges(merges_file())
    except (OSError, ValueError):  # tiktoken has the tokens alone
        return shown_tokens(), _merges_of(token_bytes())


def _merges_of(tokens: list[bytes]) -> list[tuple[str, str]]:
    """The two tokens that each merge joins, as GPT-2's files write them. tokens: by their ids,
    which are in the order of the merges. Takes a second."""
    ids = {token: i for i, token in enumerate(tokens)}
    shown = list(shown_tokens())
    merges = (_last_merge(token, ids) for token in tokens if len(token) > 1)
    return [(shown[ids[left]], shown[ids[right]]) for left, right in merges]


def _last_merge(token: bytes, ids: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding joins to this one. Ids are in the order of the merges,
    so those that came before it are applied, lowest id first, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ids.get(parts[i] + parts[i + 1], VOCAB_SIZE))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
