"""Times the implementations of each kernel against each other and against the device's bandwidth."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.files import SCHEMA_VERSION
from megatron_jet.evaluation.kernel_cases import CASES, Case, Draw, Inputs, Shape, use_backend
from megatron_jet.evaluation.throughput.session import Clock

LAPS = 10
LAP_SECONDS = 0.02  # calls are repeated within a lap until it is about this long


class KernelRow(ResultModel):
    """One implementation of one operation at one shape; `measured` is empty where it was skipped."""

    operation: str
    passes: str = Field(description="forward, or forward+backward")
    backend: str
    shape: str
    bytes: int = Field(description="inputs and outputs once, and for the backward their gradients: the least to move")
    skipped: str | None = None
    error: float | None = Field(default=None, description="RMS of the difference to the reference over its RMS")
    measured: dict[str, float] = Field(default_factory=dict, description="milliseconds, bytes_per_second, share")


class KernelResult(ResultModel):
    """A whole comparison."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "kernels"
    date: str
    command: str
    device: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[KernelRow]
    measured: dict[str, float] = Field(description="the device's bytes per second")


def bench(
    operations: Sequence[str],
    shapes: Sequence[Shape],
    device: torch.device,
    dtype: torch.dtype,
    bytes_per_second: float,
) -> Iterator[KernelRow]:
    """Rows of every operation, shape, pass and backend, as they are measured.

    Args:
        operations: names in CASES.
        shapes: operations that decode use them with one token.
        device, dtype: of the inputs.
        bytes_per_second: of the device, to compare with.
    """
    for operation in operations:
        case = CASES[operation]
        for shape in dict.fromkeys(_shape_for(case, shape) for shape in shapes):
            inputs = case.draw(Draw(shape, device, dtype))
            for backward in (False,) if case.decodes else (False, True):
                yield from _compare(case, shape, inputs, backward, device, bytes_per_second)


def _shape_for(case: Case, shape: Shape) -> Shape:
    return Shape(shape.batch, 1, shape.heads, shape.key_dim, shape.value_dim) if case.decodes else shape


def _compare(
    case: Case, shape: Shape, inputs: Inputs, backward: bool, device: torch.device, bytes_per_second: float
) -> Iterator[KernelRow]:
    """The backends of one case. The reference runs first, because the others are compared with it."""
    expected = None
    moved = bytes_moved(case, inputs, backward)
    for backend in case.backends:
        row = KernelRow(
            operation=case.operation,
            passes="forward+backward" if backward else "forward",
            backend=backend,
            shape=str(shape),
            bytes=moved,
        )
        if backend != "reference" and device.type != "cuda":
            yield row.replace(skipped=f"{backend} needs a GPU, this is {device.type}")
            continue
        with use_backend(case.operation, backend):
            run = runner(case, inputs, backward)
            try:
                found = run()
                seconds = median_seconds(run, device)
            except (RuntimeError, ValueError, ImportError) as error:  # no package, no memory, too wide a head
                yield row.replace(skipped=str(error).splitlines()[0])
                continue
        if backend == "reference":
            expected = [x.detach() for x in found]
        rate = moved / seconds
        yield row.replace(
            error=None if expected is None else largest_error(found, expected),
            measured={
                "milliseconds": seconds * 1e3,
                "bytes_per_second": rate,
                "share": rate / bytes_per_second,
            },
        )


def runner(case: Case, inputs: Inputs, backward: bool) -> Callable[[], list[Tensor]]:
    """A call that gives the outputs, or with `backward` the gradients of all inputs for equal output gradients."""
    if not backward:

        @torch.no_grad()
        def forward() -> list[Tensor]:
            return case.call(inputs)

        return forward

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def both() -> list[Tensor]:
        outputs = case.call(leaves)
        return list(torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs]))

    return both


@torch.no_grad()
def bytes_moved(case: Case, inputs: Inputs, backward: bool) -> int:
    """The least that an implementation reads and writes.

    Forward: inputs and outputs once. The backward reads inputs and output gradients and writes input gradients. Output
    sizes come from a run of the reference, the only one that every device has.
    """
    with use_backend(case.operation, "reference"):
        written = sum(x.nbytes for x in case.call(inputs))
    read = sum(x.nbytes for x in inputs.values())
    return 3 * read + 2 * written if backward else read + written


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, over laps of as many calls as a clock needs."""
    run()  # compiled, tuned
    clock = Clock(device)
    run()
    clock.lap()
    laps = []
    calls = max(1, int(LAP_SECONDS / max(clock.intervals()[0], 1e-7)))
    for _ in range(LAPS):
        clock = Clock(device)
        for _ in range(calls):
            run()
        clock.lap()
        laps.append(clock.intervals()[0] / calls)
    return statistics.median(laps)


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest RMS of a difference over the RMS of what it should be, among the tensors."""
    ratios = []
    for actual, wanted in zip(found, expected, strict=True):
        difference = (actual.double() - wanted.double()).square().mean().sqrt()
        ratios.append((difference / wanted.double().square().mean().sqrt().clamp(min=1e-30)).item())
    return max(ratios)
