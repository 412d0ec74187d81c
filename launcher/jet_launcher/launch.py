"""`run` and `resume`: from a recipe and overrides to a finished run, or to one clear line."""

import json
import sys

from jet_launcher.cluster_launch import (
    cluster_of,
    continue_on_cluster,
    launch_on_cluster,
    load_target,
    refuse_live_jobs,
)
from jet_launcher.exit_codes import DONE
from jet_launcher.forecast import Forecast, check_disk, check_layout, forecast
from jet_launcher.local import Outcome, run_local, shown_id
from jet_launcher.options import LaunchOptions, check_inputs, data_notes, inputs_problem
from jet_launcher.processes import worker_command
from jet_launcher.progress import make_display
from jet_launcher.provenance import last_stages, record_launch
from jet_launcher.remote import remote_of
from jet_launcher.run_directory import (
    RunDirectory,
    check_directory,
    check_upstream_results,
    choose_stages,
    find_run,
    open_run,
    safe_name,
)
from jet_launcher.stage_status import read_run, run_state
from jet_launcher.usage import usage_errors
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate_text import model_text, run_text
from megatron_jet.configs.files import describe_os_error
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.run_estimate import estimate_run
from megatron_jet.configs.teacher_source import expand_paths, teacher_model

CONTEXT_SHOWN = 65536


def launch(recipe: str, overrides: list[str], options: LaunchOptions) -> int:
    """Run a recipe. Returns the exit code.

    Raises:
        UserError: anything wrong with what was asked; nothing has been written then, except by a full disk.
    """
    target = load_target(options.cluster)
    with usage_errors():
        config = apply_overrides(load_recipe(recipe), overrides)
    stages = choose_stages(config, options.stages)
    if target is not None:
        return launch_on_cluster(config, stages, options, target)
    if options.dryrun:
        return _dry_run(config, stages, options)
    with usage_errors():
        config = expand_paths(config)
    teacher = check_inputs(config)
    check_upstream_results(config, stages, options.output)
    run = open_run(config, options.output, options.root)
    return execute(run, config, teacher, stages, options)


def resume(run_id: str, options: LaunchOptions) -> int:
    """Go on with a run: the stages of its last launch that are not finished. Returns the exit code."""
    run = find_run(run_id, options.root)
    remote = remote_of(run)
    if remote is not None:
        flags = [flag for flag, on in (("--wait", options.wait), ("--json", options.as_json)) if on]
        return remote.forward("resume", *(["--stages", options.stages] if options.stages else []), *flags)
    config = run.config()
    stages = choose_stages(config, options.stages or last_stages(run))
    target = cluster_of(run, options.cluster)
    if target is not None:
        return continue_on_cluster(run, config, stages, options, target)
    check_upstream_results(config, stages, run.path)
    return execute(run, config, check_inputs(config), stages, options)


def execute(
    run: RunDirectory, config: RunConfig, teacher: ModelConfig, stages: tuple[str, ...], options: LaunchOptions
) -> int:
    """Run stages in an existing run directory. Returns the exit code."""
    expected = forecast(config, teacher, stages, run, options.root)
    check_disk(expected, run)
    # A program reads stdout under --json; people still see progress on stderr.
    stream = sys.stderr if options.as_json else sys.stdout
    try:
        with run.locked():
            refuse_live_jobs(run)
            record_launch(run, config, stages)
            _announce(run, stages, expected, stream)
            for note in data_notes(config, stages):
                print(f"note: {note}", file=stream, flush=True)
            display = make_display(stream)
            try:
                outcome = run_local(run, stages, config.nproc, display)
            finally:
                display.close()
    except OSError as error:
        raise UserError(describe_os_error(error, run.path)) from None
    _conclude(run, stages, outcome, options.as_json, stream)
    return outcome.exit_code


def _announce(run: RunDirectory, stages: tuple[str, ...], expected: Forecast, stream) -> None:
    print(f"run {shown_id(run)}: {', '.join(stages)}", file=stream)
    print(f"forecast: {expected.line()}", file=stream, flush=True)


def _conclude(run: RunDirectory, stages: tuple[str, ...], outcome: Outcome, as_json: bool, stream) -> None:
    statuses = read_run(run, stages)
    report = run.report_file if "report" in stages and run.report_file.is_file() else None
    for line in outcome.log_tail:
        print(f"  | {line}", file=sys.stderr)
    if outcome.message:
        print(outcome.message if outcome.exit_code != 1 else f"error: {outcome.message}", file=sys.stderr)
    elif report is not None:
        print(f"report: {report}", file=stream)
    if as_json:
        summary = {
            "schema_version": 1,
            "run": str(run.path),
            "state": run_state(run, statuses),
            "exit_code": outcome.exit_code,
            "message": outcome.message or None,
            "report": str(report) if report else None,
            "stages": [status.to_dict() for status in statuses],
        }
        print(json.dumps(summary, indent=2))


def _dry_run(config: RunConfig, stages: tuple[str, ...], options: LaunchOptions) -> int:
    """Print what would happen. Works without the teacher, the data and the variables that name them."""
    try:
        config = expand_paths(config)
        missing = inputs_problem(config)
    except UserError as error:
        missing = str(error)
    with usage_errors():
        teacher = teacher_model(config.teacher)
        check_layout(config, teacher)
    estimate = estimate_run(config, teacher)
    output = options.output or options.root / f"{safe_name(config.recipe)}-<time>"
    run = RunDirectory(output)
    if options.output is not None:
        check_directory(config, run)
    command = worker_command(run.path, stages, config.nproc)
    if options.as_json:
        plan = {
            "schema_version": 1,
            "run": str(run.path),
            "stages": list(stages),
            "command": command,
            "config": config.to_dict(),
            "estimate": [stage.to_dict() for stage in estimate.stages],
            "missing": missing,
        }
        print(json.dumps(plan, indent=2))
        return DONE
    print(f"would run in {run.path}: {', '.join(stages)}")
    print(f"worker: {' '.join(command)}\n")
    print(model_text("teacher", teacher, CONTEXT_SHOWN) + "\n")
    print(model_text("student (planned)", estimate.student, CONTEXT_SHOWN) + "\n")
    print(run_text(estimate))
    if missing:
        print(f"\nnot ready here: {missing}")
    print("nothing was written (--dryrun)")
    return DONE
