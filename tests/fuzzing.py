"""How many cases a fuzz test tries: some in every run, as many as FUZZ_CASES says in a long one."""

import os


def cases(default: int) -> int:
    return int(os.environ.get("FUZZ_CASES", default))
