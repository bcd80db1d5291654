"""How many cases a fuzz test tries: some hundreds, or as many as FUZZ_CASES says (`make fuzz`)."""

import os


def cases(default: int) -> int:
    return int(os.environ.get("FUZZ_CASES", default))
