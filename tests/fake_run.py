"""A run directory with results of every stage, made up but consistent, for tests of what reads results."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.files import hash_json, write_json, write_text
from megatron_jet.configs.layer_plan import hybrid_plan, uniform_phases
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.results import (
    BeamRound,
    CandidateResult,
    ComparisonRow,
    EvaluateResult,
    ExportResult,
    Measured,
    PlacementResult,
    PlacementScore,
    PrepareResult,
    Scores,
    SelectionResult,
    TrainStageResult,
)

TEACHER = ModelConfig(
    hidden_size=128,
    intermediate_size=352,
    num_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=448,
    layer_plan=("attn",) * 8,
)
FULL, SWA, HASH = (2, 5), (1,), "0" * 64
RECALL_GAIN = (0.02, 0.05, 0.33, 0.04, 0.11, 0.21, 0.03, 0.01)
CHOICE_GAIN = (0.02, 0.30, 0.06, 0.22, 0.05, 0.10, 0.03, 0.02)


def scores(recall: float, choice: float, copy: float, text: float) -> Scores:
    """Scores whose losses follow their accuracies."""
    accuracy = {"recall": recall, "choice": choice, "copy": copy}
    loss = {task: -math.log(max(value, 0.01)) for task, value in accuracy.items()}
    error = {task: math.sqrt(max(0.0, value * (1 - value)) / 100) for task, value in accuracy.items()}
    return Scores(accuracy=accuracy, loss={**loss, "text": text}, error=error)


def placed(full: tuple[int, ...], bonus: float = 0.0) -> Scores:
    """Scores of a placement: gains add up, with a bonus for the pair that works together."""
    joint = 0.14 if set(FULL) <= set(full) else 0.0
    recall = 0.21 + sum(RECALL_GAIN[i] for i in full) + joint + bonus
    choice = 0.33 + sum(CHOICE_GAIN[i] for i in full) + bonus / 2
    copy, text = 0.48 + 0.06 * len(full) + bonus / 2, 2.31 - 0.05 * len(full) - bonus
    return scores(min(0.98, recall), min(0.97, choice), min(0.96, copy), max(1.52, text))


def measured(seconds: float, generation: dict[str, float] | None = None, **more: Any) -> Measured:
    prefill = {context: 9 * speed for context, speed in generation.items()} if generation else None
    return Measured(seconds=seconds, generation_tokens_per_second=generation, prefill_tokens_per_second=prefill, **more)


def beam(candidates: list[list[tuple[int, ...]]], width: int, best) -> list[BeamRound]:
    rounds = []
    for placements in candidates:
        rows = sorted((PlacementScore(full=full, scores=placed(full)) for full in placements), key=best)
        rounds.append(BeamRound(candidates=rows, kept=[row.full for row in rows[:width]]))
    return rounds


def placement_result() -> PlacementResult:
    singles = [(i,) for i in range(8)]
    pairs = sorted({tuple(sorted((a, b))) for a in (2, 4, 5) for b in range(8) if a != b})
    rows = [
        ComparisonRow(name="learned", full=FULL, before=placed(FULL, -0.02), after=placed(FULL, 0.07)),
        ComparisonRow(name="uniform", full=(2, 6), before=placed((2, 6), -0.02), after=placed((2, 6), 0.06)),
    ]
    rows += [
        ComparisonRow(name=f"uniform phase {k}", full=full, before=placed(full, -0.02))
        for k, full in enumerate(uniform_phases(8, 2))
        if full != (2, 6)
    ]
    rows.append(ComparisonRow(name="all_linear", full=(), before=placed((), -0.01)))
    rows.append(ComparisonRow(name="all_full", full=tuple(range(8)), before=scores(0.97, 0.94, 0.93, 1.49)))
    return PlacementResult(
        stage="placement",
        inputs_hash=HASH,
        tokens=327_680,
        full=FULL,
        swa=SWA,
        swa_window=32,
        plan=hybrid_plan(8, "gla", FULL, {1: 32}),
        objective="recall",
        swa_objective="choice",
        heat_map=[PlacementScore(full=full, scores=placed(full)) for full in singles],
        all_linear=placed(()),
        all_full=scores(0.97, 0.94, 0.93, 1.49),
        beam=beam([singles, pairs], 3, lambda row: (-row.scores.accuracy["recall"], row.full)),
        swa_beam=beam([[(i,) for i in (0, 1, 3, 4, 6, 7)]], 3, lambda row: (row.scores.loss["choice"], row.full)),
        uniform=(2, 6),
        comparison=rows,
        layer_forwards=212,
        layer_forwards_naive=360,
        final_losses={"total": 0.62, "feature": 0.21, "kl": 0.41, "cross_entropy": 0.0},
        measured=measured(148.2, train_tokens_per_second=2800.0),
    )


def candidate(name: str, sizes: dict[str, Any], accuracy: float, speed: float, **more: Any) -> CandidateResult:
    kind = name.removesuffix("_static") if name in ("gla", "gated_delta_net", "jet", "jet_static") else "jet"
    mixer = tiny().mixers[kind].replace(**sizes)
    model = TEACHER.with_plan(hybrid_plan(8, kind, FULL, {1: 32}), {kind: mixer})
    cost = model_cost(model, 2048)
    return CandidateResult(
        name=name,
        mixer=kind,
        mixer_config=mixer.to_dict(),
        params=cost.total_params,
        state_bytes=mixer.cache_bytes(TEACHER.shape, 2048),
        analytic_flops_per_token=cost.flops_per_token,
        scores=scores(accuracy + 0.05, accuracy, accuracy - 0.04, 2.6 - accuracy),
        final_losses={"total": 1.1 - accuracy},
        tokens=81_920,
        analytic_tokens_per_second={"2048": speed * 1.2},
        recipe_hash=hash_json([kind, sizes, name == "jet_static"]),
        measured=measured(14.0, {"2048": speed}, train_tokens_per_second=4 * speed),
        **more,
    )


def selection(stage: str, candidates: list[CandidateResult], pareto: list[str], rule: str) -> SelectionResult:
    ranking = sorted(candidates, key=lambda c: -c.scores.accuracy["recall"])
    winner = next(c for c in ranking if not c.ablation)
    return SelectionResult(
        stage=stage,
        inputs_hash=HASH,
        tokens=sum(c.tokens for c in candidates if c.reused_from is None),
        candidates=candidates,
        ranking=[c.name for c in ranking],
        winner=winner.name,
        winner_mixer=winner.mixer,
        winner_config=winner.mixer_config,
        rule=rule,
        pareto=pareto,
        measured=measured(51.0),
    )


def selections() -> list[SelectionResult]:
    rule = "highest mean accuracy over recall, choice, copy on the search split"
    blocks = [candidate("gla", {}, 0.71, 730), candidate("gated_delta_net", {}, 0.79, 640)]
    blocks.append(candidate("jet", {}, 0.81, 610))
    new = [
        candidate("gated_delta_net", {}, 0.79, 640, reused_from="block_selection"),
        candidate("jet", {}, 0.81, 610, reused_from="block_selection"),
        candidate("jet_static", {}, 0.785, 660, ablation=True),
    ]
    grid = [
        candidate(f"{k}x{v}x{h}", {"head_dim": k, "expand_v": v / k, "num_heads": h}, accuracy, speed)
        for k, v, h, accuracy, speed in (
            (16, 64, 4, 0.83, 598),
            (32, 32, 4, 0.81, 610),
            (64, 16, 4, 0.76, 622),
            (32, 64, 2, 0.80, 615),
            (16, 32, 8, 0.82, 604),
        )
    ]
    return [
        selection("block_selection", blocks, ["gla", "gated_delta_net", "jet"], rule),
        selection("new_block", new, ["jet_static", "jet"], f"{rule}; jet_static is an ablation and cannot win"),
        selection(
            "hardware_search", grid, ["64x16x4", "32x64x2", "32x32x4", "16x32x8", "16x64x4"], f"{rule} within 3%"
        ),
    ]


def final_model() -> ModelConfig:
    mixer = tiny().mixers["jet"].replace(head_dim=16, expand_v=4.0, num_heads=4)
    return TEACHER.with_plan(hybrid_plan(8, "jet", FULL, {1: 32}), {"jet": mixer})


def training_stages() -> list[TrainStageResult]:
    path = [scores(0.84, 0.81, 0.77, 1.80), scores(0.93, 0.90, 0.88, 1.62), scores(0.955, 0.92, 0.91, 1.56)]
    return [
        TrainStageResult(
            stage=stage,
            inputs_hash=HASH,
            tokens=tokens,
            plan=final_model().layer_plan,
            model=final_model().to_dict(),
            checkpoint=f"stages/{stage}/jobs/student/checkpoints/step-{steps}/model",
            final_losses={"total": 0.3, "kl": 0.2, "feature": 0.1, "cross_entropy": 0.0},
            validation=[{"step": float(step), "loss": 1.0 / step} for step in range(20, steps + 1, 20)],
            before=path[i],
            after=path[i + 1],
            measured=measured(seconds, train_tokens_per_second=3100.0),
        )
        for i, (stage, tokens, steps, seconds) in enumerate(
            (("stage1", 245_760, 120, 78.0), ("stage2", 122_880, 60, 45.0))
        )
    ]


def evaluate_result() -> EvaluateResult:
    contexts = (1024, 4096, 16384)
    teacher_speed = {str(c): 900 / (1 + c / 3000) for c in contexts}
    final_speed = {str(c): 760 / (1 + c / 16000) for c in contexts}
    return EvaluateResult(
        stage="evaluate",
        inputs_hash=HASH,
        teacher=scores(0.97, 0.94, 0.93, 1.49),
        final=scores(0.955, 0.92, 0.91, 1.56),
        megatron=scores(0.955, 0.92, 0.91, 1.56),
        teacher_params=model_cost(TEACHER, 1).total_params,
        final_params=model_cost(final_model(), 1).total_params,
        teacher_cache_bytes={str(c): model_cost(TEACHER, c).cache_bytes for c in (4096, 65536, 262144)},
        final_cache_bytes={str(c): model_cost(final_model(), c).cache_bytes for c in (4096, 65536, 262144)},
        teacher_measured=measured(11.0, teacher_speed),
        final_measured=measured(9.0, final_speed),
        measured=measured(31.0),
    )


def other_results() -> list[Any]:
    prepare = PrepareResult(
        stage="prepare",
        inputs_hash=HASH,
        teacher_path="bundled:tiny",
        teacher_checkpoint="prepared/teacher",
        teacher_config=TEACHER.to_dict(),
        data_path="prepared/data",
        tokenizer_path="bundled:tiny",
        teacher_hash=HASH,
        data_index_hash=HASH,
        sources=["text", "recall", "choice", "copy"],
        measured=measured(7.5),
    )
    export = ExportResult(
        stage="export",
        inputs_hash=HASH,
        path="export",
        model_type="jet_nemotron",
        files={"model.safetensors": HASH},
        max_logit_difference=3.1e-6,
        measured=measured(4.2),
    )
    return [prepare, export]


def metrics_rows(job: str, steps: int, start: float, every: int = 1) -> list[dict[str, Any]]:
    rows = []
    for step in range(every, steps + 1, every):
        decay = math.exp(-3 * step / steps) + 0.03 * math.sin(step * 1.7)
        kl, feature = start * (0.2 + 0.8 * decay), start * (0.1 + 0.5 * decay)
        row = {"step": step, "total_steps": steps, "kl": kl, "feature": feature, "loss": kl + feature}
        row |= {"cross_entropy": 0.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 2048 * step, "memory_mib": 512.0}
        rows.append({**row, "tokens_per_second": 3000.0 + step, "run": job, "split": "train"})
        if step % 40 == 0:
            rows.append({"step": step, "loss": kl + feature + 0.02, "kl": kl, "run": job, "split": "validation"})
    return rows


def write_fake_run(path: Path, stages: tuple[str, ...] | None = None) -> Path:
    """Write a run directory; with `stages`, one in which only these have finished."""
    write_text(path / "config.yaml", dump_yaml(tiny()))
    results = [*other_results(), placement_result(), *selections(), *training_stages(), evaluate_result()]
    for result in results:
        if stages is None or result.stage in stages:
            write_json(path / "stages" / result.stage / "result.json", result.to_dict())
    jobs = [("placement", "supernet", 120), ("stage1", "student", 120), ("stage2", "student", 60)]
    jobs += [("block_selection", name, 40) for name in ("gla", "gated_delta_net", "jet")]
    jobs += [("new_block", "jet_static", 40)]
    jobs += [("hardware_search", name, 25) for name in ("16x64x4", "32x32x4", "64x16x4", "32x64x2", "16x32x8")]
    for i, (stage, job, steps) in enumerate(jobs):
        if stages is None or stage in stages:
            rows = metrics_rows(f"{stage}/{job}", steps, 1.0 + 0.1 * i)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(path / "stages" / stage / "jobs" / job / "metrics.jsonl", text)
    launch = {
        "time": "2026-03-01T10:00:00+0000",
        "command": "python launcher/postnas.py run tiny --output runs/tiny",
        "stages": list(tiny().stages),
        "git": {
            "revision": "0123456789abcdef0123456789abcdef01234567",
            "dirty": True,
            "diff": "-a\n+<b>\n",
            "untracked": [],
        },
        "python": "3.12.8",
        "packages": {"megatron-core": "0.19.2", "torch": "2.11.0", "transformers": "5.23.0"},
        "hardware": {
            "host": "laptop",
            "platform": "Linux-6.1-x86_64",
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_bytes": 24 << 30,
            "gpus": [],
        },
        "environment": {"OMP_NUM_THREADS": "1"},
    }
    write_json(path / "provenance.json", {"config_hash": HASH, "launches": [launch]})
    return path
