"""What is known of tasks beyond a run: names to show, published scores, chance.

    title("hellaswag")                          # "HellaSwag"
    published("hellaswag", "completion")        # {"gpt2": (0.2859, 0.2955), ...}: acc, acc_norm

A task without a line here is shown under its own name.
"""

from dataclasses import dataclass, field

Scores = dict[str, tuple[float, float]]  # model: (acc, acc_norm)


@dataclass(frozen=True)
class Known:
    title: str
    examples: int  # that the published scores are of
    chance: float
    published: dict[str, Scores] = field(default_factory=dict)  # by style


# Scores of OpenAI's weights, no examples in the prompt. completion: the loop that the GPT-2
# reproduction community uses; lm-eval: EleutherAI's lm-evaluation-harness.
KNOWN = {
    "hellaswag": Known(
        "HellaSwag",
        examples=10_042,  # all of val
        chance=0.25,
        published={
            "completion": {"gpt2": (0.2859, 0.2955), "gpt2-xl": (0.3842, 0.4893)},
            "lm-eval": {"gpt2": (0.2892, 0.3114), "gpt2-xl": (0.4004, 0.5089)},
        },
    )
}
MODELS = {"gpt2": "GPT-2 124M", "gpt2-xl": "GPT-2 1.5B"}  # as pictures call them


def title(task: str) -> str:
    """The name of a task as people write it."""
    return KNOWN[task].title if task in KNOWN else task


def published(task: str, style: str) -> Scores:
    """{model: (acc, acc_norm)} of others' models; empty where nothing is known."""
    return KNOWN[task].published.get(style, {}) if task in KNOWN else {}
