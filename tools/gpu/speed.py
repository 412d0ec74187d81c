#!/usr/bin/env python3
"""Decoding and prefill of Jet-Nemotron-2B and Qwen3-1.7B at fixed batches, beside their rooflines: in two minutes.

    python speed.py OUTPUT.json [--dry] [--only decode|prefill]

tools/throughput.py looks for the largest batch and prefills every prompt in full, which takes hours at 64K. Here the
cache is allocated at its full length and filled with random numbers, as decoding speed does not depend on them; prefill
is timed at a batch that takes about a second. Same sessions, graphs and rooflines. After every figure the file is
written anew.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from megatron_jet.evaluation.device import find_device, measure_rates, record  # noqa: E402
from megatron_jet.evaluation.throughput.caches import cache_bytes, place  # noqa: E402
from megatron_jet.evaluation.throughput.models import Subject, open_subject, random_model  # noqa: E402
from megatron_jet.evaluation.throughput.roofline import decode_work, prefill_work  # noqa: E402
from megatron_jet.evaluation.throughput.session import Clock, Load, Session  # noqa: E402

GRAPHS, LAPS = 16, 5  # graphs recorded, and how often they are replayed
# model, context, batch. 128 at 64K is the paper's.
DECODE = (
    ("Jet-Nemotron-2B", 65536, 128),
    ("Qwen3-1.7B", 65536, 8),
    ("Jet-Nemotron-2B", 4096, 128),
    ("Qwen3-1.7B", 4096, 96),
    ("Jet-Nemotron-2B", 4096, 512),
)
# model, context, batch, chunk
PREFILL = (
    ("Jet-Nemotron-2B", 4096, 16, 4096),
    ("Qwen3-1.7B", 4096, 16, 4096),
    ("Jet-Nemotron-2B", 65536, 2, 8192),
    ("Qwen3-1.7B", 65536, 2, 8192),
)


class Bench:
    """Models, device rates and the result file."""

    def __init__(self, path: Path, dry: bool):
        self.path, self.dry = path, dry
        self.device = find_device("cpu" if dry else None)
        self.dtype = "fp32" if dry else "bf16"
        self.rates = measure_rates(self.device, torch.float32 if dry else torch.bfloat16)
        self.result = record("speed", self.device) | {
            "measured": {
                "bytes_per_second": self.rates.bytes_per_second,
                "flops_per_second": self.rates.flops_per_second,
            },
            "rows": [],
        }
        self.subjects: dict[str, Subject] = {}

    def model(self, name: str, longest: int) -> Subject:
        """Made once, with random weights."""
        if name not in self.subjects:
            self.subjects[name] = (
                self.small(name)
                if self.dry
                else open_subject(
                    name, dtype=self.dtype, attention="auto", device=self.device, longest=longest, beyond_positions=True
                )
            )
        return self.subjects[name]

    def small(self, name: str) -> Subject:
        """Four layers of a few channels, to try the script on a CPU."""
        from megatron_jet.configs.recipes.known_models import KNOWN_MODELS

        full = KNOWN_MODELS[name]()
        plan = ("jet", "attn", "jet", "swa:32") if "jet" in full.layer_plan else ("attn",) * 4
        shape = full.replace(
            hidden_size=64,
            intermediate_size=96,
            num_layers=4,
            layer_plan=plan,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=256,
        )
        return Subject(name, shape, random_model(shape, "fp32", self.device).eval(), True)

    def add(self, row: dict) -> None:
        """Keep and print a row."""
        self.result["rows"].append(row)
        self.path.write_text(json.dumps(self.result, indent=2))
        print({k: v for k, v in row.items() if k != "kernels"}, flush=True)

    def attempt(self, kind: str, run, name: str, context: int, *rest: int) -> None:
        """One row; what fails (no memory, say) is its error and does not stop the others."""
        started = time.monotonic()
        row = {"kind": kind, "model": name, "context": context, "batch_size": rest[0]}
        try:
            row |= run(self.model(name, context + 256), context, *rest)
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        self.add(row | {"took_seconds": round(time.monotonic() - started, 1)})

    @torch.no_grad()
    def decode(self, subject: Subject, context: int, batch: int) -> dict:
        """Milliseconds of a decoding step behind `context` random tokens."""
        # A chunk of one token: the session then needs no prefill pass over the full cache.
        load = Load(context, batch, prefill_chunk=1, new_tokens=GRAPHS)
        with Session(subject.model, load, "auto") as session:
            for layer in session._cache.layers:
                for name, x in vars(layer).items():
                    if name in ("keys", "values") and x is not None:
                        x.normal_()
            seconds = []
            for _ in range(LAPS):
                with session._on_stream():
                    place(session._cache, context)
                    clock = Clock(self.device)
                    session._decode()
                    clock.lap()
                    seconds.append(clock.intervals()[0] / GRAPHS)
            held = cache_bytes(session._cache)
        return self.rated(decode_work(subject.shape, load, self.dtype), seconds, batch) | {
            "graphs": session.graphed,
            "cache_bytes": held,
            "kernels": self.kernels(subject, load),
        }

    @torch.no_grad()
    def prefill(self, subject: Subject, context: int, batch: int, chunk: int) -> dict:
        """Seconds of a whole prefill: the second of two."""
        load = Load(context, batch, min(chunk, context), new_tokens=1)
        with Session(subject.model, load, "eager") as session:
            seconds = [session.run(seed).prefill for seed in range(2)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        return self.rated(prefill_work(subject.shape, load, self.dtype), seconds[1:], batch * context) | {
            "chunk": load.prefill_chunk,
            "first_seconds": seconds[0],
            "peak_gib": round(peak, 1),
        }

    def rated(self, work, seconds: list[float], tokens: int) -> dict:
        """Medians beside the roofline."""
        limit = work.seconds(self.rates.bytes_per_second, self.rates.flops_per_second)
        median = statistics.median(seconds)
        return {
            "milliseconds": median * 1e3,
            "spread": (max(seconds) - min(seconds)) / median,
            "tokens_per_second": tokens / median,
            "roofline_tokens_per_second": tokens / limit,
            "share": limit / median,
        }

    def kernels(self, subject: Subject, load: Load) -> dict:
        """Launches of one eager decoding step, and where its time goes."""
        if self.device.type != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        with Session(subject.model, load, "eager") as session, session._on_stream():
            session._step(0)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                session._step(1)
                torch.cuda.synchronize()
        events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
        events.sort(key=lambda e: -e.self_device_time_total)
        return {
            "launches": sum(e.count for e in events),
            "kernel_milliseconds": sum(e.self_device_time_total for e in events) / 1e3,
            "top": [[e.key[:90], e.count, round(e.self_device_time_total / 1e3, 3)] for e in events[:25]],
        }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; a bad one prints the usage and exits 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--dry", action="store_true", help="small models on the CPU")
    parser.add_argument("--only", choices=("decode", "prefill"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure everything. Returns 1 where some figure could not be had."""
    options = parse_arguments(arguments)
    bench = Bench(options.output, options.dry)
    if options.only != "prefill":
        for name, context, batch in DECODE:
            bench.attempt("decode", bench.decode, name, *((256, 2) if options.dry else (context, batch)))
    if options.only != "decode":
        for name, context, batch, chunk in PREFILL:
            bench.attempt("prefill", bench.prefill, name, *((256, 2, 64) if options.dry else (context, batch, chunk)))
    return 1 if any("error" in row for row in bench.result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
