"""GPT-2's vocabulary as OpenAI published it, for tests that need an independent reference."""

import json
from pathlib import Path

MERGES = Path(__file__).parent.parent / "pretrain" / "tokens" / "vocab.bpe"


def encoder_json() -> bytes:
    """OpenAI's encoder.json, byte for byte: tiktoken compares its hash with the published one."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = range(0x100, 0x100 + 256 - len(printable))
    lines = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]
    tokens = [*map(chr, [*printable, *rest]), *(line.replace(" ", "") for line in lines)]
    return json.dumps({token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}).encode()


def serve(url: str) -> bytes:
    """In the place of tiktoken's download."""
    return encoder_json() if url.endswith("/encoder.json") else MERGES.read_bytes()
