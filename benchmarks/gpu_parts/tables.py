"""What was measured, as Markdown.

text = table(results)      # results: what gpu.json holds
"""

from typing import Any

Results = dict[str, Any]


def table(results: Results) -> str:
    parts = [about(results), checks(results), speed(results), others(results), missing(results)]
    return "\n".join(part for part in parts if part)


def rows(header: list[str], lines: list[list[str]]) -> str:
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(text) + "\n"


def about(results: Results) -> str:
    found = results.get("machine", {})
    small = ", in small: times say nothing" if results["small"] else ""
    data = found.get("data", {})
    return (
        f"**{found.get('device', 'unknown device')}**, torch {found.get('torch', '?')}"
        f" (CUDA {found.get('cuda') or '-'}), {found.get('gpus', 0)} GPU(s){small}."
        f" {results['seconds']:.0f} s. Tokens: {data.get('tokens', '?')}.\n"
    )


def checks(results: Results) -> str:
    if not results["checks"]:
        return ""
    lines = [[c["name"], c["outcome"], c["detail"]] for c in results["checks"]]
    return rows(["check", "", "measured"], lines)


def speed(results: Results) -> str:
    if not results["speed"]:
        return ""
    lines = []
    for one in results["speed"]:
        ratio, mfu = one.get("to_plain"), one.get("mfu")
        lines.append(
            [
                one["size"],
                one["name"],
                f"{one['tokens_per_second']:,.0f}",
                f"{ratio:.2f}" if ratio else "",
                f"{mfu:.1%}" if mfu else "",
                f"{one['memory_bytes'] / 1e9:.1f}",
                f"{one['milliseconds']:.1f}",
                f"{one['first_seconds']:.0f}",
            ]
        )
    header = ["size", "update", "tokens/s", "x plain", "MFU", "GB", "ms", "first, s"]
    return rows(header, lines)


def others(results: Results) -> str:
    lines = [
        [one["name"], one["what"], ", ".join(shown(k, v) for k, v in one.items() if shown(k, v))]
        for one in results["others"]
    ]
    return rows(["besides", "what", "measured"], lines) if lines else ""


def shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if name == "mfu":
        return f"MFU {value:.1%}"
    if name.endswith("bytes"):
        return f"{name.removesuffix('bytes').strip('_') or 'size'} {value / 1e9:.2f} GB"
    words = name.replace("_", " ").replace("tokens per second", "tokens/s")
    return f"{words} {value:,.0f}" if value >= 100 else f"{words} {value:.3g}"


def missing(results: Results) -> str:
    lines = [f"- skipped: {one['name']}: {one['why']}" for one in results["skipped"]]
    lines += [f"- FAILED: {one['name']}: {one['why']}" for one in results["failed"]]
    return "\n".join(lines) + "\n" if lines else ""
