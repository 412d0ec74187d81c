"""Times one or two models at every context, by the paper's protocol, beside their rooflines and the paper's figures."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.evaluation.device import Rates as DeviceRates
from megatron_jet.evaluation.throughput.batch_search import is_out_of_memory, largest_batch, session_fits
from megatron_jet.evaluation.throughput.models import Subject
from megatron_jet.evaluation.throughput.paper import paper_generation, paper_ratios, published_name
from megatron_jet.evaluation.throughput.protocol import Rates, rates, run_interleaved
from megatron_jet.evaluation.throughput.result import ModelRecord, Ratio, Row, RowMeasured, Skipped, ThroughputResult
from megatron_jet.evaluation.throughput.roofline import (
    decode_weight_bytes,
    decode_work,
    predicted_cache_bytes,
    prefill_work,
)
from megatron_jet.evaluation.throughput.session import Load, Session, Timing, check_decode

# Tokens of one prefill chunk over the whole batch: enough to keep the device busy, few enough for its memory.
CHUNK_TOKENS = {"cuda": 65536, "cpu": 2048}
SMALLEST_CHUNK = 64
TURN = 5  # iterations of a model before the other's turn, where only one at a time fits into memory


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        contexts: tokens per sequence before generation.
        new_tokens: generated per sequence.
        iterations: of each model and context, dropped ones included.
        dropped: first iterations that do not count.
        batch_size: sequences, or None for the largest batch that fits.
        max_batch: limit of that search.
        prefill_chunk: tokens, or None to choose it by the batch.
        dtype: "fp32", "bf16" or "fp16".
        decode: "auto", "eager" or "graph".
        memory_limit: bytes that weights and cache may take; on a CPU the search for a batch needs it.
    """

    contexts: tuple[int, ...]
    new_tokens: int
    iterations: int
    dropped: int
    batch_size: int | None
    max_batch: int
    prefill_chunk: int | None
    dtype: str
    decode: str
    memory_limit: int | None

    def check(self, device: torch.device) -> None:
        """Raise UserError for what this device cannot do."""
        check_decode(self.decode, device, "--decode graph")
        if device.type != "cuda" and self.batch_size is None and self.memory_limit is None:
            raise UserError("--batch-size search: a CPU has no memory limit to find; give --memory-limit or a number")


def compare(
    subjects: Sequence[Subject],
    protocol: Protocol,
    device: torch.device,
    speed: DeviceRates,
    head: dict[str, Any],
    say: Callable[[str], None],
    keep: Callable[[ThroughputResult], None],
) -> ThroughputResult:
    """Measure all contexts, from short to long.

    Args:
        subjects: one model, or two for a ratio.
        protocol: how.
        device: where they are.
        speed: the device's own.
        head: date, command, device and versions (`evaluation.device.record`).
        say: gets a line of progress per context.
        keep: gets the result so far after every context, so that a long run can be cut short.
    """
    result = ThroughputResult(
        **head,
        settings=asdict(protocol),
        models=[describe(subject, protocol, device) for subject in subjects],
        measured=asdict(speed),
    )
    for context in sorted(protocol.contexts):
        rows, skipped = _measure_context(subjects, context, protocol, device, speed, say)
        result = result.replace(
            rows=[*result.rows, *rows],
            ratios=[*result.ratios, *ratio_of(subjects, rows, context)],
            skipped=[*result.skipped, *skipped],
        )
        keep(result)
    return result


def describe(subject: Subject, protocol: Protocol, device: torch.device) -> ModelRecord:
    """What a result says about a model."""
    graphed = protocol.decode == "graph" or (protocol.decode == "auto" and device.type == "cuda")
    return ModelRecord(
        name=subject.name,
        published=published_name(subject.shape),
        params=model_cost(subject.shape, 1).total_params,
        random_weights=subject.random,
        layers=dict(Counter(split_entry(entry)[0] for entry in subject.shape.layer_plan)),
        attention=subject.model.config._attn_implementation,
        decode="graph" if graphed else "eager",
    )


def _measure_context(
    subjects: Sequence[Subject],
    context: int,
    protocol: Protocol,
    device: torch.device,
    speed: DeviceRates,
    say: Callable[[str], None],
) -> tuple[list[Row], list[Skipped]]:
    loads, skipped = {}, []
    for subject in subjects:
        try:
            loads[subject.name] = choose_load(subject, context, protocol, device)
        except UserError as error:
            say(f"{context} tokens: {subject.name} left out: {error}")
            skipped.append(Skipped(model=subject.name, context=context, reason=str(error)))
    present = [subject for subject in subjects if subject.name in loads]
    sizes = ", ".join(f"{name} batch {load.batch_size} chunk {load.prefill_chunk}" for name, load in loads.items())
    say(f"{context} tokens: timing {sizes}" if loads else f"{context} tokens: nothing to time")
    sessions, timings = _time(present, [loads[subject.name] for subject in present], protocol, device, say)
    rows = []
    for subject, session, times in zip(present, sessions, timings):
        found = rates(times, session.load, protocol.dropped)
        rows.append(make_row(subject, session, found, protocol.dtype, speed))
    return rows, skipped


def _time(
    subjects: Sequence[Subject],
    loads: list[Load],
    protocol: Protocol,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[Session], list[list[Timing]]]:
    """Run the sessions. A batch that was found to fit may not after all (memory in pieces); then all get smaller."""
    turn = TURN if device.type == "cuda" else None
    while True:
        sessions = [Session(subject.model, load, protocol.decode) for subject, load in zip(subjects, loads)]
        try:
            return sessions, run_interleaved(sessions, protocol.iterations, turn)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler, so that nothing holds on to the memory of what failed.
        if protocol.batch_size is not None or all(load.batch_size == 1 for load in loads):
            raise UserError(
                f"out of memory at {loads[0].context} tokens with batch {max(load.batch_size for load in loads)}; "
                "choose a smaller --batch-size, or 'search'"
            )
        loads = [replace(load, batch_size=max(1, load.batch_size * 7 // 8)) for load in loads]
        say(f"{loads[0].context} tokens: out of memory, trying batch {', '.join(str(x.batch_size) for x in loads)}")


def choose_load(subject: Subject, context: int, protocol: Protocol, device: torch.device) -> Load:
    """Batch and chunk for one model at one context: as given, or the largest batch that fits.

    Raises:
        UserError: no batch fits.
    """

    def load(batch_size: int) -> Load:
        chunk = protocol.prefill_chunk or default_chunk(context, batch_size, device)
        return Load(context, batch_size, min(chunk, context), protocol.new_tokens)

    if protocol.batch_size is not None:
        return load(protocol.batch_size)
    if device.type == "cuda":
        first = first_batch(subject, context + protocol.new_tokens, protocol.dtype, torch.cuda.mem_get_info(device)[0])
        fits = partial(_session_fits, subject, load, protocol.decode)
    else:
        first = 1
        fits = partial(fits_limit, subject, context + protocol.new_tokens, protocol.dtype, protocol.memory_limit)
    return load(largest_batch(fits, protocol.max_batch, first))


def first_batch(subject: Subject, tokens: int, dtype: str, free: int) -> int:
    """Where a search in `free` bytes starts: what fits by the formulas, less room for activations and state copies."""
    return max(1, free // (2 * predicted_cache_bytes(subject.shape, tokens, dtype)))


def _session_fits(subject: Subject, load: Callable[[int], Load], decode: str, batch_size: int) -> bool:
    return session_fits(subject.model, load(batch_size), decode)


def fits_limit(subject: Subject, tokens: int, dtype: str, limit: int, batch_size: int) -> bool:
    """Whether weights and the cache of a batch of `tokens` tokens stay within `limit` bytes by the formulas."""
    cache = batch_size * predicted_cache_bytes(subject.shape, tokens, dtype)
    return decode_weight_bytes(subject.shape, dtype) + cache <= limit


def default_chunk(context: int, batch_size: int, device: torch.device) -> int:
    """The power of two that gives about CHUNK_TOKENS tokens over the batch, within 64 and the context."""
    tokens = max(1, CHUNK_TOKENS[device.type] // batch_size)
    return min(context, max(SMALLEST_CHUNK, 2 ** (tokens.bit_length() - 1)))


def make_row(subject: Subject, session: Session, found: Rates, dtype: str, speed: DeviceRates) -> Row:
    """A model's figures at one context."""
    load, shape = session.load, subject.shape
    decode, prefill = decode_work(shape, load, dtype), prefill_work(shape, load, dtype)
    limits = speed.bytes_per_second, speed.flops_per_second
    return Row(
        model=subject.name,
        context=load.context,
        batch_size=load.batch_size,
        prefill_chunk=load.prefill_chunk,
        predicted_cache_bytes=predicted_cache_bytes(shape, load.longest, dtype),
        decode_bytes=decode.bytes,
        prefill_flops=prefill.flops,
        paper_generation=paper_generation(shape, load.context),
        measured=RowMeasured(
            prefill_tokens_per_second=found.prefill,
            generation_tokens_per_second=found.generation,
            spread=found.spread,
            cache_bytes=session.cache_bytes // load.batch_size,
            prefill_roofline=load.batch_size * load.context / prefill.seconds(*limits),
            generation_roofline=load.batch_size / decode.seconds(*limits),
        ),
    )


def ratio_of(subjects: Sequence[Subject], rows: Sequence[Row], context: int) -> list[Ratio]:
    """First over second where both were measured, else nothing."""
    if len(subjects) != 2 or len(rows) != 2:
        return []
    first, second = (row.measured for row in rows)
    prefill, generation = paper_ratios(subjects[0].shape, subjects[1].shape, context) or (None, None)
    return [
        Ratio(
            context=context,
            paper_prefill=prefill,
            paper_generation=generation,
            measured={
                "prefill": first.prefill_tokens_per_second / second.prefill_tokens_per_second,
                "generation": first.generation_tokens_per_second / second.generation_tokens_per_second,
            },
        )
    ]
