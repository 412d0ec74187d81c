"""The command line of launcher/postnas.py. The work is imported when a command runs, so that --help answers at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Post Neural Architecture Search: a pre-trained full-attention model becomes a fast hybrid one.",
    epilog="Example: python launcher/postnas.py run tiny --output runs/tiny. "
    "Exit codes: 0 done, 1 failed, 2 usage (nothing was started), 75 interrupted and worth starting again.",
)

RunId = Annotated[str, typer.Argument(metavar="ID", help="name of the run directory, or its path")]
Root = Annotated[Path, typer.Option("--runs", help="directory that holds the runs", envvar="JET_RUNS")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Stages = Annotated[str | None, typer.Option("--stages", metavar="a,b", help="only these stages (and prepare)")]
Wait = Annotated[bool, typer.Option("--wait", help="on a cluster: stay until all jobs have ended")]
RUNS = Path("runs")


@app.command(
    epilog="Example: python launcher/postnas.py run tiny --stages placement,block_selection "
    "placement.budget=1 placement.training.steps=60"
)
def run(
    recipe: Annotated[
        str, typer.Argument(help="tiny, jet_nemotron_2b, jet_nemotron_4b, package.module:function or a config.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="changes to the recipe, typed")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="where to run: local is this machine; else a cluster's name or file")
    ] = "local",
    stages: Stages = None,
    output: Annotated[
        Path | None, typer.Option(help="run directory; an existing one is continued when its config is the same")
    ] = None,
    root: Root = RUNS,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="print what would run and what it costs")] = False,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline, or some of its stages."""
    from jet_launcher.launch import LaunchOptions, launch

    options = LaunchOptions(cluster, stages, output, root, dryrun, as_json, wait)
    raise typer.Exit(launch(recipe, overrides or [], options))


@app.command(epilog="Example: python launcher/postnas.py resume tiny-20260301-101500")
def resume(
    run_id: RunId,
    cluster: Annotated[str | None, typer.Option(help="by default where the run was before")] = None,
    stages: Stages = None,
    root: Root = RUNS,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Continue a run: only what is missing."""
    from jet_launcher.launch import LaunchOptions
    from jet_launcher.launch import resume as continue_run

    options = LaunchOptions(cluster, stages, None, root, False, as_json, wait)
    raise typer.Exit(continue_run(run_id, options))


@app.command("list", epilog="Example: python launcher/postnas.py list --json")
def list_(root: Root = RUNS, as_json: Json = False) -> None:
    """All runs and how they stand."""
    from jet_launcher.commands import list_command

    raise typer.Exit(list_command(root, as_json))


@app.command(epilog="Example: python launcher/postnas.py status tiny")
def status(run_id: RunId, root: Root = RUNS, as_json: Json = False) -> None:
    """Every stage of a run: state, step, losses, time left."""
    from jet_launcher.commands import status_command

    raise typer.Exit(status_command(run_id, root, as_json))


@app.command(epilog="Example: python launcher/postnas.py logs tiny placement -f")
def logs(
    run_id: RunId,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="by default the one that ran last")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on until the run ends")] = False,
    root: Root = RUNS,
) -> None:
    """Show the log of a stage."""
    from jet_launcher.commands import logs_command

    raise typer.Exit(logs_command(run_id, stage, follow, root))


@app.command(epilog="Example: python launcher/postnas.py report tiny")
def report(run_id: RunId, root: Root = RUNS) -> None:
    """Write report.html and report.json, even of an unfinished run."""
    from jet_launcher.commands import report_command

    raise typer.Exit(report_command(run_id, root))


@app.command(epilog="Example: python launcher/postnas.py cancel tiny")
def cancel(run_id: RunId, root: Root = RUNS) -> None:
    """Stop a run; it saves first and can be resumed."""
    from jet_launcher.commands import cancel_command

    raise typer.Exit(cancel_command(run_id, root))


@app.command(epilog="Example: python launcher/postnas.py clean tiny --dryrun")
def clean(
    run_id: RunId,
    everything: Annotated[bool, typer.Option("--all", help="remove the whole run directory")] = False,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="only say what would go")] = False,
    root: Root = RUNS,
) -> None:
    """Remove checkpoints that no result needs; the results stay."""
    from jet_launcher.commands import clean_command

    raise typer.Exit(clean_command(run_id, root, everything, dryrun))


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code; prints one `error:` line for bad input and for what the file system
    refuses."""
    from megatron_jet.configs.command_line import run_tool

    return run_tool(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        app(args=arguments, prog_name="postnas.py")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
