"""What of a metrics.jsonl is taken: one schema, so that what reads a run meets no odd value.

    clean({"event": "train", "step": 3.0, "loss": NaN, "lr": [1]})
    # {"event": "train", "step": 3, "loss": "nan"}

A log may come from another program, another version or a broken disk. A field of the wrong kind is
left out, a record without an event is none. Loads neither torch nor matplotlib.
"""

import json
import math
import stat
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LARGEST = 1e30  # of any number: beyond it axes and sums overflow, so it counts as infinite
LAST_STEP = 2**53  # exact in float64
LAST_SECOND = 253_402_300_799  # 9999-12-31, what a date can show
SETTINGS = 1000  # of a configuration that are shown at most
NUMBERS = {"train", "eval"}  # events whose fields are numbers
NESTED = {"tasks", "sources"}  # but for these, which hold some by name


def number(value: Any) -> float:
    """A log's number; nan for what is none. The log writes nan and inf as strings."""
    if type(value) is float and -LARGEST <= value <= LARGEST:
        return value  # nearly all are: a report asks a million times
    if isinstance(value, str):
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value, math.nan)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf
    return value if math.isnan(value) or abs(value) <= LARGEST else math.copysign(math.inf, value)


def text(value: Any) -> str:
    """A string that any encoding and font can be given: without lone surrogates."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def loads(line: bytes | str) -> Any:
    """json.loads. Raises ValueError for whatever is wrong, nesting beyond Python's depth too."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def clean(record: Any) -> Record | None:
    """The record with those of its fields that are as they should be; None for what is no record.

    `step` is an int from 0 on, `time` seconds since 1970. Numbers are finite, or the strings "nan",
    "inf" and "-inf". `tasks` holds {name: {field: number or string}}, also where an old log has
    `hellaswag`.
    """
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    event = text(record["event"])
    kept: Record = {"event": event}
    if 0 <= (seconds := number(record.get("time"))) <= LAST_SECOND:
        kept["time"] = seconds
    if 0 <= (step := number(record.get("step"))) <= LAST_STEP and step == int(step):
        kept["step"] = int(step)
    rest = {text(k): v for k, v in record.items() if k not in ("event", "time", "step")}
    if event in NUMBERS:
        kept |= _numbers({key: value for key, value in rest.items() if key not in NESTED})
        if tasks := tasks_of(rest):
            kept["tasks"] = tasks
        if sources := _by_name(rest.get("sources")):
            kept["sources"] = sources
    elif event == "save":
        kept |= _numbers(rest)
    elif event == "sample":
        kept["prompt"] = text(rest.get("prompt") or "")
        texts = rest.get("text", rest.get("texts", ""))
        kept["texts"] = [text(one) for one in (texts if isinstance(texts, list) else [texts])]
    elif event == "stop":
        kept["reason"] = text(rest.get("reason", "stopped"))
        kept |= _numbers({key: value for key, value in rest.items() if key != "reason"})
    elif event == "start":
        kept["settings"] = flat(rest)
    return kept


def _numbers(values: Record) -> Record:
    """Those of the values that are numbers, as the log writes them."""
    kept: Record = {}
    for key, value in values.items():
        found = number(value)
        if math.isfinite(found):
            kept[key] = value
        elif value in ("nan", "inf", "-inf") or isinstance(value, float | int):
            kept[key] = str(found)
    return {key: value for key, value in kept.items() if not isinstance(value, bool)}


def tasks_of(record: Record) -> dict[str, Record]:
    """{task: summary} of an "eval" record. Logs of before tasks had names hold one, `hellaswag`,
    or one for each style: {"completion": {...}, "lm-eval": {...}}."""
    found: dict[str, Record] = {}
    old, tasks = record.get("hellaswag"), record.get("tasks")
    if isinstance(old, dict):
        styles = {style: result for style, result in old.items() if isinstance(result, dict)}
        for style, result in styles.items():
            found[f"hellaswag:{text(style)}"] = _summary({"style": style, **result})
        if not styles:
            found["hellaswag"] = _summary(old)
    for name, result in tasks.items() if isinstance(tasks, dict) else ():
        if isinstance(result, dict):
            found[text(name)] = _summary(result)
    return {name: result for name, result in found.items() if result}


def _by_name(value: Any) -> dict[str, Record]:
    """{source: its numbers} of a mixture."""
    found = value.items() if isinstance(value, dict) else ()
    return {text(name): _summary(part) for name, part in found if isinstance(part, dict)}


def _summary(result: Record) -> Record:
    words = {text(k): text(v)[:100] for k, v in result.items() if isinstance(v, str)}
    return words | _numbers({text(key): value for key, value in result.items()})


def flat(value: Record) -> dict[str, Any]:
    """Settings under one name each, {"model.n_layer": 12}; of more than SETTINGS the first."""
    found: dict[str, Any] = {}
    waiting = [("", value)]  # a list and no recursion: files may nest as deep as json reads
    while waiting and len(found) < SETTINGS:
        prefix, inner = waiting.pop()
        later = []
        for key, item in inner.items():
            name = f"{prefix}{text(key)}"[:200]
            if isinstance(item, dict):
                later.append((f"{name}.", item))
            elif len(found) < SETTINGS:
                found[name] = _setting(item)
        waiting += reversed(later)
    return found


def _setting(value: Any) -> Any:
    """A setting as the page can show it: a plain value, else its JSON, cut where it is long."""
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(number(value)) else str(number(value))
    if isinstance(value, str):
        return text(value)[:2000]
    try:
        return text(json.dumps(value, ensure_ascii=False))[:2000]
    except (ValueError, RecursionError):
        return "..."


def is_regular(path: Path) -> bool:
    """Whether reading the path ends: a pipe of that name would be waited for. Raises OSError."""
    return stat.S_ISREG(path.stat().st_mode)
