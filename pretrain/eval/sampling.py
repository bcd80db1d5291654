"""Text from a model: prompts to tokens, and tokens back to text as they come.

    sample_text(model, load_encoding(), "The mill", max_new_tokens=40, temperature=0.8, top_k=50,
    seed=1)

The model is an argument: anything whose `stream` is that of model.GPT.
"""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from pretrain.tokens.tokenizer import END_OF_TEXT, TokenizerUnavailable, load_encoding

if TYPE_CHECKING:
    import tiktoken

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


def encode_prompt(encoding: "tiktoken.Encoding", prompt: str) -> list[int]:
    """Token ids of a prompt. An empty one is the end-of-text token, after which a document begins;
    so is a <|endoftext|> in the prompt, unlike in training data, where it is ordinary text."""
    return encoding.encode(prompt, allowed_special="all") or [END_OF_TEXT]


def stream_texts(
    model, encoding: "tiktoken.Encoding", prompts: Sequence[str], max_new_tokens: int, **sampling
) -> Iterator[list[str | None]]:
    """Yield, token by token, what each prompt's continuation grows by; None for one that has ended.

    `sampling` goes to model.stream: temperature, top_k, top_p, seed, slide. A continuation ends
    before an end-of-text or after max_new_tokens. A character of several tokens comes whole, with
    its last token, and the pieces together are what the encoding decodes the tokens to: bytes that
    are no UTF-8, such as a character cut off by the end, become U+FFFD.
    """
    rows = [torch.tensor(encode_prompt(encoding, prompt)) for prompt in prompts]
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    ended = [False] * len(prompts)
    for tokens in model.stream(rows, max_new_tokens, stop_token=END_OF_TEXT, **sampling):
        pieces: list[str | None] = []
        for row, token in enumerate(tokens.tolist()):
            if ended[row]:
                pieces.append(None)
            elif token == END_OF_TEXT:
                ended[row] = True
                pieces.append(decoders[row].decode(b"", final=True))
            else:
                # Vocabularies that others padded have ids past the encoding's.
                known = token < encoding.n_vocab
                new = encoding.decode_single_token_bytes(token) if known else UNKNOWN
                pieces.append(decoders[row].decode(new))
        yield pieces
    yield [
        None if ended[row] else decoder.decode(b"", final=True)
        for row, decoder in enumerate(decoders)
    ]


def sample_text(
    model, encoding: "tiktoken.Encoding", prompt: str, max_new_tokens: int = 100, **sampling
) -> str:
    """The prompt and its continuation; `sampling` as in stream_texts."""
    pieces = stream_texts(model, encoding, [prompt], max_new_tokens, **sampling)
    return prompt + "".join(piece or "" for (piece,) in pieces)


class TrainingSamples:
    """What a model in training makes of one prompt, time after time with the same random
    numbers."""

    def __init__(self, prompt: str, max_new_tokens: int, seed: int):
        self.prompt, self.max_new_tokens, self.seed = prompt, max_new_tokens, seed
        self._left_out = False

    def write(self, model, interrupted: Callable[[], bool] = lambda: False) -> str | None:
        """The continuation; None once `interrupted`, which is asked at each token, and, with one
        warning, where prompt or vocabulary do not fit. Leaves global random numbers alone."""
        if self._left_out:
            return None
        try:
            encoding, size = load_encoding(), model.config.vocab_size
            if max(encode_prompt(encoding, self.prompt)) >= size:
                raise ValueError(f"the model knows {size} tokens, {self.prompt!r} has others")
            pieces = stream_texts(
                model,
                encoding,
                [self.prompt],
                self.max_new_tokens,
                temperature=0.8,
                top_k=50,
                seed=self.seed,
                slide=-(-model.config.block_size // 4),
            )
            text = ""
            for (piece,) in pieces:
                if interrupted():
                    return None
                text += piece or ""
            return text
        except (TokenizerUnavailable, ValueError) as error:
            self._left_out = True
            print(f"warning: samples are left out: {error}", file=sys.stderr)
            return None
