"""One model at one context and batch size: prefill in chunks, then greedy decoding, on a synchronised clock."""

import functools
import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from megatron_jet.configs.errors import UserError
from megatron_jet.evaluation.throughput.caches import (
    addresses,
    cache_bytes,
    go_home,
    new_cache,
    pin,
    place,
    rewind,
)
from megatron_jet.evaluation.throughput.graphs import DecodeGraphs


@dataclass(frozen=True)
class Load:
    """What a session runs: `batch_size` random sequences of `context` tokens, then `new_tokens` greedy ones each."""

    context: int
    batch_size: int
    prefill_chunk: int
    new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of a sequence at the end."""
        return self.context + self.new_tokens


@dataclass(frozen=True)
class Timing:
    """Seconds of one prefill and of decoding all new tokens after it."""

    prefill: float
    decode: float


class Session:
    """A model with cache, warmed-up kernels and, on a GPU, recorded decode graphs. Use as a context manager.

    Args:
        model: in eval mode, on its device.
        load: what to run.
        decode: "eager", "graph" (CUDA graphs) or "auto": graphs on a GPU.
    """

    def __init__(self, model: PreTrainedModel, load: Load, decode: str = "auto") -> None:
        self.model, self.load = model, load
        self.device = model.device
        self.graphed = decode == "graph" or (decode == "auto" and self.device.type == "cuda")
        self._stream = side_stream(self.device) if self.device.type == "cuda" else None
        self._graphs: DecodeGraphs | None = None
        self._cache = None
        self.cache_bytes = 0

    def __enter__(self) -> "Session":
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @torch.no_grad()
    def open(self) -> None:
        """Allocate the cache at its full length, run every kind of step once, record the decode graphs.

        No whole prompt is run: the steps that need most memory are the last chunk and decoding, both over a full cache,
        so a session that opens also runs.

        Raises:
            torch.OutOfMemoryError: the batch does not fit; close the session then.
            RuntimeError: the graphs do not give the tokens that eager decoding gives.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_stream():
            self._token = torch.zeros(self.load.batch_size, 1, dtype=torch.long, device=self.device)
            self._new = torch.zeros(self.load.new_tokens, self.load.batch_size, dtype=torch.long, device=self.device)
            self._cache = new_cache(self.model.config, self.load.longest)
            self._warm_up()
            self.cache_bytes = cache_bytes(self._cache)
            if self.graphed:
                self._record()
                self._check_replay()

    def close(self) -> None:
        """Free everything but the model."""
        self._graphs = self._cache = self._token = self._new = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    @torch.no_grad()
    def run(self, seed: int) -> Timing:
        """Time one prefill of new random tokens and the decoding after it.

        Raises:
            RuntimeError: a buffer moved since the graphs were recorded.
        """
        with self._on_stream():
            prompt = self._random_tokens(self.load.context, seed)
            self._check_addresses()
            clock = Clock(self.device)
            self._prefill(prompt)
            clock.lap()
            self._decode()
            clock.lap()
            return Timing(*clock.intervals())

    def tokens(self) -> Tensor:
        """The tokens of the last run [new_tokens, b]."""
        return self._new.clone()

    def _prefill(self, prompt: Tensor) -> None:
        rewind(self._cache)
        pin(self._cache, self.graphed)
        for chunk in prompt.split(self.load.prefill_chunk, dim=1):
            self._forward(chunk)
        pin(self._cache, False)

    def _decode(self) -> None:
        if self._graphs is not None:
            self._graphs.replay()
            return
        for i in range(self.load.new_tokens):
            self._step(i)

    def _forward(self, tokens: Tensor) -> None:
        """[b, t] -> the next token of each row, into `_token`."""
        output = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token.copy_(output.logits[:, -1:].argmax(-1))

    def _step(self, i: int) -> None:
        with self._decode_kernels():
            self._forward(self._token)
        self._new[i].copy_(self._token[:, 0])

    def _warm_up(self) -> None:
        """Compile kernels, and let every buffer grow to its final size."""
        load = self.load
        chunk = min(load.prefill_chunk, load.context)
        last = load.context % chunk or chunk
        pin(self._cache, self.graphed)
        # Twice at the start: the first time the cache has no buffers yet, and attention takes another path.
        for start, length in ((0, chunk), (0, chunk), (load.context - last, last)):
            if start == 0:
                rewind(self._cache)
            place(self._cache, start)
            self._forward(self._random_tokens(length, seed=0))
        pin(self._cache, False)
        # The first decoding steps, and the last one, for which the buffers must have room.
        for i in sorted({0, min(1, load.new_tokens - 1), load.new_tokens - 1}):
            place(self._cache, load.context + i)
            self._step(i)

    def _record(self) -> None:
        place(self._cache, self.load.context)
        go_home(self._cache)
        self._addresses = addresses(self._cache)
        self._graphs = DecodeGraphs(self._step, self.load.new_tokens, self._stream)

    def _check_replay(self) -> None:
        """Compare one replayed step with the same step run eagerly. Rows may differ where two logits are equal."""
        load, tokens = self.load, []
        chunk = self._random_tokens(min(load.prefill_chunk, load.context), seed=1)
        for step in (lambda: self._step(0), lambda: self._graphs.replay(1)):
            rewind(self._cache)
            pin(self._cache, True)
            place(self._cache, load.context - chunk.shape[1])
            self._forward(chunk)
            pin(self._cache, False)
            step()
            tokens.append(self._new[0].clone())
        agreeing = (tokens[0] == tokens[1]).float().mean().item()
        if agreeing < 0.5:
            raise RuntimeError(
                f"CUDA graphs give other tokens than eager decoding in {1 - agreeing:.0%} of the rows; "
                "use --decode eager and report this"
            )

    def _check_addresses(self) -> None:
        if self._graphs is not None and addresses(self._cache) != self._addresses:
            raise RuntimeError("the cache moved in memory after its CUDA graphs were recorded; use --decode eager")

    def _random_tokens(self, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.load.batch_size, length)
        return torch.randint(0, self.model.config.vocab_size, shape, generator=generator).to(self.device)

    def _decode_kernels(self):
        """SDPA without cuDNN's kernel, which makes a new plan for every length of the context."""
        if self._stream is None:
            return nullcontext()
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

    def _on_stream(self):
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def check_decode(decode: str, device: torch.device, where: str) -> None:
    """Raise UserError when this device cannot decode so; `where` names the setting."""
    if decode == "graph" and device.type != "cuda":
        raise UserError(f"{where}: CUDA graphs need a GPU; use eager or auto")


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all sessions: graphs cannot be recorded on the default stream, and cuBLAS keeps memory per stream."""
    return torch.cuda.Stream(device)


class Clock:
    """Laps in seconds: CUDA events on the current stream of a GPU, the wall clock elsewhere. Starts when made."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize(device)  # what was queued before is not ours
        self._marks = []
        self.lap()

    def lap(self) -> None:
        """Mark the end of a lap."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals(self) -> list[float]:
        """Seconds of each lap. Waits for the last."""
        pairs = list(zip(self._marks, self._marks[1:]))
        if not self._cuda:
            return [end - start for start, end in pairs]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
