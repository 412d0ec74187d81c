"""A Hugging Face model as lm-evaluation-harness sees it."""

import sys
from collections.abc import Sequence

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_jet.evaluation.tiny_tasks import read_ids

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


class HarnessModel(HFLM):
    """The harness's own wrapper, which also reads token ids and runs shared beginnings once.

    A request whose tokens are the beginning of another's is answered out of the other's forward pass; that holds for
    every causal model. Our tasks ask for every answer of a sequence, so they run once per sequence instead of once per
    answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        max_length: int | None = None,
        max_new_tokens: int = 256,
    ):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.max_new_tokens = max_new_tokens

    def set_lengths(self, max_length: int | None, max_new_tokens: int) -> None:
        """Change the length that prompts are cut to (None: the model's) and the default generation limit."""
        self._max_length, self.max_new_tokens = max_length, max_new_tokens

    @property
    def max_gen_toks(self) -> int:
        return self.max_new_tokens

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[Answer]:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm or not sys.stderr.isatty())

    def tok_encode(self, string: str, *args, **kwargs) -> list[int]:
        ids = read_ids(string)
        return super().tok_encode(string, *args, **kwargs) if ids is None else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids = read_ids(context)
        return super()._encode_pair(context, continuation) if ids is None else (ids, read_ids(continuation))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Log-likelihood of every continuation (nats), and whether greedy decoding would give it."""
        inputs = [self._model_input(context, continuation) for _, context, continuation in requests]
        answers: list[Answer | None] = [None] * len(requests)
        groups = share_beginnings(inputs)
        batch_size = override_bs or self.batch_size
        for start in tqdm(range(0, len(groups), batch_size), disable=disable_tqdm, desc="scoring"):
            batch = groups[start : start + batch_size]
            for group, logits in zip(batch, self._logits([inputs[group[0]] for group in batch]), strict=True):
                for i in group:
                    text, _, continuation = requests[i]
                    answers[i] = judge(logits, len(inputs[i]), continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[i])
        return answers

    def _model_input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads: all but the last token, cut from the left to the longest allowed."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a request with {len(context)} context and {len(continuation)} continuation tokens does not fit "
                f"a length of {self.max_length}"
            )
        return tuple((context + continuation)[-(self.max_length + 1) : -1])

    def _logits(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Logits [b, s, vocab] of rows padded on the right, which no causal model sees."""
        length = max(len(row) for row in rows)
        tokens = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows], device=self.device)
        with torch.no_grad():
            return self.model(input_ids=tokens, use_cache=False).logits


def share_beginnings(inputs: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Groups of indices into `inputs` where every member is a beginning of the group's first; longest groups first."""
    groups: list[list[int]] = []
    # Sorted downwards, a sequence comes right before the beginnings of it.
    for i in sorted(range(len(inputs)), key=lambda i: inputs[i], reverse=True):
        longest = inputs[groups[-1][0]] if groups else ()
        if groups and longest[: len(inputs[i])] == inputs[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return sorted(groups, key=lambda group: -len(inputs[group[0]]))


def judge(logits: Tensor, length: int, continuation: list[int]) -> Answer:
    """Score a continuation.

    Args:
        logits: [s, vocab] of an input whose first `length` tokens are the request's.
        length: tokens of the request's input.
        continuation: tokens scored; the last is predicted by position length - 1.
    """
    picked = logits[length - len(continuation) : length].float()  # [n, vocab]
    targets = torch.tensor(continuation, device=picked.device)
    chosen = picked.gather(-1, targets[:, None])[:, 0] - picked.logsumexp(-1)  # [n]
    return chosen.double().sum().item(), bool((picked.argmax(-1) == targets).all())
