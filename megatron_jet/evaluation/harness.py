"""Evaluate a Hugging Face directory with lm-evaluation-harness: its tasks, the paper's groups, and our own tasks."""

import difflib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_jet.configs.errors import UserError
from megatron_jet.convert.hf_package import MODELS, hf_config, load_for_causal_lm
from megatron_jet.evaluation.device import find_device
from megatron_jet.evaluation.presets import Preset
from megatron_jet.evaluation.result import EvaluationResult, PresetResult, TaskResult
from megatron_jet.evaluation.tiny_tasks import PREFIX, TASKS_DIR, TINY_TASKS, write_documents
from megatron_jet.tasks.evalset import load_eval_sets

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWSHOT_SEED = 1234  # the harness's default; it draws the examples in the prompts


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        data_dir: prepared data with the evaluation sets of the tiny tasks.
        split: which split of it.
        sequences: take only so many sequences of each evaluation set (what stages call samples).
        limit: take only so many questions of each task.
        batch_size: sequences per forward pass.
        dtype: "auto" (as saved), "fp32", "bf16" or "fp16".
        device: torch device; None: the GPU if there is one.
        trust_remote_code: run modeling code that lies in the directory.
        allow_code: run programs that the model wrote (HumanEval and the like). They are not sandboxed.
    """

    data_dir: str | None = None
    split: str = "heldout"
    sequences: int | None = None
    limit: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    allow_code: bool = False


def evaluate(
    hf_dir: str | Path,
    tasks: Sequence[str],
    presets: Sequence[Preset] = (),
    options: EvaluationOptions = EvaluationOptions(),
    say: Callable[[str], None] = lambda line: None,
) -> EvaluationResult:
    """Run harness tasks on a model.

    Args:
        hf_dir: Hugging Face directory with a tokenizer.
        tasks: harness names; "tiny" stands for all of this project's that the data has.
        presets: groups of the paper, each run with its own lengths and shots.
        options: see there.
        say: called with a line at the beginning of each phase.

    Raises:
        UserError: no harness, an unknown task, data that is not on this machine, or a directory that is no model.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'megatron-jet[eval]'")
    find_device(options.device)  # a wrong one is found out before anything is loaded
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as documents:
        _check_code(presets, options)
        # Reading the harness's own thousands of task files takes many seconds.
        builtin = bool(presets) or any(name != "tiny" and not name.startswith(PREFIX) for name in tasks)
        manager = task_manager(documents, builtin)
        check_names(manager, tasks)
        say(f"loading {hf_dir}")
        tokenizer = load_tokenizer(hf_dir, options.trust_remote_code)
        tasks = expand_tiny(tasks, options, tokenizer, Path(documents), hf_config(Path(hf_dir)).get("vocab_size"))
        jobs = [(preset.name, preset.tasks, preset) for preset in presets]
        if tasks:
            jobs.insert(0, (", ".join(tasks), tuple(tasks), None))
        loaded = [_load_tasks(manager, names, preset, options) for _, names, preset in jobs]
        model = load_model(hf_dir, options)

        from megatron_jet.evaluation.harness_model import HarnessModel

        harness_model = HarnessModel(model, tokenizer, options.batch_size)
        results, grouped = {}, {}
        for (title, _, preset), job_tasks in zip(jobs, loaded, strict=True):
            say(f"running {title}")
            harness_model.set_lengths(preset and preset.max_length, preset.max_new_tokens if preset else 256)
            found = _run(harness_model, job_tasks, options)
            results |= found
            if preset is not None:
                grouped[preset.name] = preset_result(preset, found)
    return EvaluationResult(
        model=str(hf_dir),
        harness=version("lm_eval"),
        settings=asdict(options),
        tasks=results,
        presets=grouped,
        measured={"seconds": time.perf_counter() - began},
    )


def fetch_task_data(tasks: Sequence[str], presets: Sequence[Preset] = (), say: Callable[[str], None] = print) -> None:
    """Download the data of harness tasks and presets into the Hugging Face cache, for machines without a network.

    Raises:
        UserError: no harness, an unknown task, or data that cannot be downloaded.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'megatron-jet[eval]'")
    manager = task_manager("", builtin=True)
    check_names(manager, tasks)
    for title, names, preset in [(name, (name,), None) for name in tasks] + [(p.name, p.tasks, p) for p in presets]:
        _load_tasks(manager, names, preset, EvaluationOptions(allow_code=True))
        say(f"data of {title}: is there")


def task_manager(documents: str | Path, builtin: bool):
    """The harness's index of task files: this project's, and the built-in ones if wanted."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_DIR), include_defaults=builtin, metadata={"data_dir": str(documents)})


def check_names(manager, names: Sequence[str]) -> None:
    """Raise UserError with the nearest names when the harness does not have one."""
    known = set(manager.all_tasks) | {"tiny"}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"this project's own are {', '.join(TINY_TASKS)}"
            raise UserError(f"no task '{name}' in the harness; {hint}")


def expand_tiny(
    tasks: Sequence[str],
    options: EvaluationOptions,
    tokenizer: PreTrainedTokenizerBase,
    documents: Path,
    vocab_size: int | None = None,
) -> list[str]:
    """Write the documents of the tiny tasks asked for, and put their names in the place of "tiny".

    Raises:
        UserError: they are asked for without data, with data that lacks one, or of a larger vocabulary than the
            model's (`vocab_size`).
    """
    if not any(task == "tiny" or task in TINY_TASKS for task in tasks):
        return list(tasks)
    if options.data_dir is None:
        raise UserError(f"the tasks {', '.join(TINY_TASKS)} need --data DIR, a directory made by tools/prepare_data.py")
    sets = load_eval_sets(options.data_dir, options.split, vocab_size=vocab_size)
    wanted = {task.removeprefix(PREFIX) for task in tasks}
    sets = [evalset for evalset in sets if "tiny" in tasks or evalset.name in wanted]
    if options.sequences is not None:
        sets = [evalset.first(options.sequences) for evalset in sets]
    present = write_documents(sets, tokenizer, documents)
    for task in tasks:
        if task in TINY_TASKS and task not in present:
            raise UserError(f"{options.data_dir}: no '{task.removeprefix(PREFIX)}' samples in split '{options.split}'")
    expanded = [name for task in tasks for name in (present if task == "tiny" else [task])]
    return list(dict.fromkeys(expanded))


def load_tokenizer(hf_dir: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Raises UserError in one line when there is none."""
    hf_dir = Path(hf_dir)
    model_class = MODELS.get(str(hf_config(hf_dir).get("model_type")))
    if not any((hf_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{hf_dir}: no tokenizer there, so no text can be evaluated; copy the base model's files in")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        if model_class is not None:
            # transformers reads the config first, and cannot read ours without the code that lies beside it.
            options["config"] = model_class.config_class.from_pretrained(hf_dir, local_files_only=True)
        return AutoTokenizer.from_pretrained(hf_dir, **options)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(f"{hf_dir}: the tokenizer cannot be loaded ({_one_line(error)})") from error


def load_model(hf_dir: str | Path, options: EvaluationOptions) -> PreTrainedModel:
    """The model on its device. Code in the directory runs only with `trust_remote_code`."""
    device = find_device(options.device)
    dtype = DTYPES[options.dtype]
    if not options.trust_remote_code:
        return load_for_causal_lm(hf_dir, dtype=dtype).to(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, local_files_only=True, trust_remote_code=True)
    except Exception as error:  # foreign code may raise anything
        raise UserError(f"{hf_dir}: {_one_line(error)}") from error
    return model.to(device).eval()


def preset_result(preset: Preset, results: dict[str, TaskResult]) -> PresetResult:
    """The paper's column out of task results. A metric that is missing leaves the column without a score."""
    parts: dict[str, float | None] = {}
    for score in preset.scores:
        value = results[score.task].metrics.get(score.metric) if score.task in results else None
        parts[score.task] = None if value is None else 100 * value
    known = [part for part in parts.values() if part is not None]
    mean = sum(known) / len(known) if len(known) == len(parts) else None
    return PresetResult(score=mean, parts=parts, comparable=preset.comparable, not_comparable=preset.not_comparable)


def task_results(raw: dict[str, Any]) -> dict[str, TaskResult]:
    """Our form of what the harness returns: "metric,filter" keys, their standard errors, shots and counts."""
    found = {}
    for name, row in raw["results"].items():
        numbers = {key: value for key, value in row.items() if "," in key and isinstance(value, (int, float))}
        found[name] = TaskResult(
            metrics={key: float(value) for key, value in numbers.items() if "_stderr," not in key},
            stderr={key.replace("_stderr,", ","): float(value) for key, value in numbers.items() if "_stderr," in key},
            num_fewshot=raw["n-shot"].get(name),
            samples=raw["n-samples"].get(name, {}).get("effective"),
            version=str(raw["versions"][name]) if name in raw["versions"] else None,
        )
    return found


def _load_tasks(manager, names: Sequence[str], preset: Preset | None, options: EvaluationOptions) -> dict[str, Any]:
    """Tasks with their data. The only step that may need a network."""
    import httpx

    try:
        loaded = manager.load(list(names))
    except UserError:
        raise
    # Connection, offline mode, no such dataset: all of datasets' own. A ValueError: other parts of it are cached.
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"the data of {', '.join(names)} is not on this machine and cannot be downloaded ({_one_line(error)}); run "
            f"tools/prefetch.py RECIPE {_fetch_option(names, preset)} where there is a network, with the same HF_HOME"
        ) from error
    except ImportError as error:
        raise UserError(f"{', '.join(names)}: the task needs a package that is missing ({error})") from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not options.allow_code:
        raise UserError(f"{', '.join(unsafe)}: runs programs written by the model, unsandboxed; add --allow-code")
    shots = preset.num_fewshot if preset else {}
    for name, task in loaded["tasks"].items():
        groups = [group for group, children in loaded.get("group_map", {}).items() if name in _leaves(loaded, children)]
        given = next((shots[key] for key in (name, *groups) if key in shots), None)
        if given is not None:
            task.set_config(key="num_fewshot", value=given)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _fetch_option(names: Sequence[str], preset: Preset | None) -> str:
    return f"--preset {preset.name}" if preset else f"--tasks {','.join(names)}"


def _leaves(loaded: dict[str, Any], children: Sequence[str]) -> set[str]:
    """Task names below a group."""
    groups = loaded.get("group_map", {})
    found = set()
    for child in children:
        found |= _leaves(loaded, groups[child]) if child in groups else {child}
    return found


def _run(model, loaded: dict[str, Any], options: EvaluationOptions) -> dict[str, TaskResult]:
    from lm_eval.evaluator import evaluate as harness_evaluate

    raw = harness_evaluate(
        lm=model,
        task_dict=loaded,
        limit=options.limit,
        bootstrap_iters=100,
        log_samples=False,
        confirm_run_unsafe_code=options.allow_code,
    )
    return task_results(raw)


def _check_code(presets: Sequence[Preset], options: EvaluationOptions) -> None:
    for preset in presets:
        if preset.runs_code and not options.allow_code:
            raise UserError(f"{preset.name}: runs programs written by the model, unsandboxed; add --allow-code")
    if options.allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric of HumanEval asks for it


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
