"""A model of this project as EleutherAI's harness asks models: log-likelihoods and continuations.

    lm = CheckpointModel(model, device=torch.device("cpu"), dtype=torch.float32)
    lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

Requests with the same context are one row of pretrain/eval/choices.py: the context is computed
once. What is scored, and after which tokens, is what the harness's own `hf` model has it do with
the exported folder.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from adapters import require

require("lm_eval")

from lm_eval import utils  # noqa: E402  (after the check that it is there)
from lm_eval.api.model import TemplateLM  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pretrain.eval import choices as engine  # noqa: E402
from pretrain.eval.generation import evaluating, stream  # noqa: E402
from pretrain.tokens.tokenizer import END_OF_TEXT, Tokenizer  # noqa: E402

NEW_TOKENS = 256  # where a task names no number, as the harness's own models have it
GENERATED_TOGETHER = 16  # prompts


class CheckpointModel(TemplateLM):
    """model: model.GPT or one of pretrain.models.ARCHITECTURES, on `device`. dtype: of the
    computation, by autocast. batch_tokens: positions in a batch, which bounds the memory (default:
    by device)."""

    backend = "causal"

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int | None = None,
    ):
        super().__init__()
        self.model, self.where, self.dtype = model, device, dtype
        self.batch_tokens = batch_tokens or engine.BATCH_TOKENS.get(device.type, 4096)
        self.parts = engine.take_apart(model)
        self.tokens = Tokenizer("tiktoken", check_every=0)

    @property
    def eot_token_id(self) -> int:
        return END_OF_TEXT

    @property
    def max_length(self) -> int:
        return int(self.parts.block_size or 1024)

    def tok_encode(self, string: str, *arguments: Any, **settings: Any) -> list[int]:
        """Token ids; a literal <|endoftext|> is ordinary text, as in training."""
        return self.tokens.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """White space at the context's end belongs to the word behind it, and the two are cut from
        the tokens of the whole."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self.tok_encode(bare)
        behind = self.tok_encode(bare + continuation)[len(before) :]
        return before or [END_OF_TEXT], behind

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **settings: Any
    ) -> list[tuple[float, bool]]:
        """For each ((context, continuation) or None, tokens of the context, those behind it): the
        log-likelihood in nats, and whether a greedy reader would have written it."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, behind) in enumerate(requests):
            if behind:  # nothing is certain, and greedy
                numbers.setdefault(tuple(context), []).append(number)
        of_item = list(numbers.values())
        items = [
            engine.Item(list(context), [requests[number][2] for number in some])
            for context, some in numbers.items()
        ]
        rows = engine.make_rows(items, self.parts.block_size, share=self.parts.packs)
        batches = engine.make_batches(rows, self.batch_tokens)
        answers = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), unit=" endings", disable=True if disable_tqdm else None)
        with bar, evaluating(self.model), engine.computing(self.where, self.dtype):
            for scores in engine.score(self.parts, batches, self.where, greedy=True):
                for item, choice, loss, greedy in zip(*scores, strict=True):
                    number = of_item[item][choice]
                    answers[number] = -float(loss), bool(greedy)
                    if (asked := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answers[number])
                bar.update(len(scores.items))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts: windows of max_length tokens that follow each
        other."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=END_OF_TEXT,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in map(utils.make_disjoint_window, pieces):
                windows.append((None, *piece))
                owners.append(number)
        sums = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_likelihood, _) in zip(owners, answers, strict=True):
            sums[number] += log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to the first of its stop texts."""
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), unit=" texts", disable=True if disable_tqdm else None)
        with bar, evaluating(self.model), engine.computing(self.where, self.dtype):
            for some in _alike(requests):
                how = requests[some[0]].args[1]
                for number, text in zip(
                    some, self._continue([requests[n].args[0] for n in some], how), strict=True
                ):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(some))
        return texts

    def _continue(self, contexts: list[str], how: dict[str, Any]) -> list[str]:
        """`how`: a task's generation_kwargs, as transformers' generate() takes them."""
        until = [how["until"]] if isinstance(how.get("until"), str) else list(how.get("until", []))
        most = int(how.get("max_gen_toks", NEW_TOKENS))
        room = max(1, self.max_length - most)
        prompts = [self.tok_encode(context)[-room:] or [END_OF_TEXT] for context in contexts]
        sampled = how.get("do_sample", bool(how.get("temperature")))
        new = stream(
            self.model,
            [torch.tensor(prompt) for prompt in prompts],
            most,
            temperature=float(how.get("temperature", 1.0)) if sampled else 0.0,
            top_k=how.get("top_k") or None,
            top_p=how.get("top_p"),
            seed=0,
            stop_token=END_OF_TEXT,
        )
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in new:
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            if all(self._ended(row, until) for row in rows):
                break
        return [self._cut(row, until) for row in rows]

    def _ended(self, row: list[int], until: list[str]) -> bool:
        return END_OF_TEXT in row or self._cut(row, until) != self.tokens.decode(row)

    def _cut(self, row: list[int], until: list[str]) -> str:
        text = self.tokens.decode(row[: row.index(END_OF_TEXT)] if END_OF_TEXT in row else row)
        for stop in filter(None, until):
            text = text.split(stop)[0]
        return text


def _alike(requests: Sequence[Any]) -> Iterator[list[int]]:
    """Numbers of requests with the same settings, those of similar length together."""

    def settings(number: int) -> str:
        return repr(requests[number].args[1])

    def order(number: int) -> tuple[str, int]:
        return settings(number), -len(requests[number].args[0])

    for _, alike in groupby(sorted(range(len(requests)), key=order), key=settings):
        numbers = list(alike)
        for start in range(0, len(numbers), GENERATED_TOGETHER):
            yield numbers[start : start + GENERATED_TOGETHER]
