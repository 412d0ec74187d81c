"""slurm/job.sh and slurm/step.sh with stand-ins for Slurm's commands: who is queued again, who gives up."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A scheduler made of files: the job's state in $FAKE/state, every command in $FAKE/calls.
FAKES = {
    # `away` holds how often it does not answer.
    "squeue": """
away=$(cat "$FAKE/away" 2> /dev/null || echo 0)
if [ "$away" -gt 0 ]; then echo $((away - 1)) > "$FAKE/away"; echo 'slurm_load_jobs error: timed out' >&2; exit 1; fi
if env | grep -qE '^(SQUEUE_|SLURM_CLUSTERS)'; then exit 0; fi
printf '%b' "$FAKE_GREETING"; cat "$FAKE/state"; printf '%b' "$FAKE_GREETING"
""",
    "scontrol": """
echo "$*" >> "$FAKE/calls"; [ "$1" = requeue ] || printf '%b' "$FAKE_GREETING"
case "$1 $2" in
    "show hostnames") printf '%s\\n' ${FAKE_NODES:-n1 n2} ;;
    "show node") echo "NodeName=$4 NodeAddr=10.0.0.7 NodeHostName=$4" ;;
    "show job")
        end=${FAKE_END:-$(date -d '+1 hour' +%FT%T)}
        echo "JobId=7 $FAKE_SECOND EndTime=$end ExcNodeList=${FAKE_EXCLUDED:-(null)} x" ;;
    "requeue 7") echo PENDING > "$FAKE/state" ;;
esac""",
    "sbatch": """
echo "sbatch $*" >> "$FAKE/calls"
[ -z "$FAKE_REFUSAL" ] || { echo "allocation failure: $FAKE_REFUSAL" >&2; exit 1; }""",
    # The step's output goes to a file, as srun's own --output does.
    "srun": """
for word in "$@"; do case $word in --output=*) exec > "${word#--output=}" 2>&1 ;; esac; done
bash -c "${FAKE_SRUN:-true}"
""",
}
JOB = """
cd "$FAKE"
source "$POSTNAS_CODE/slurm/job.sh"
postnas_sbatch=(--nodes=2 --comment="a b")
postnas_enter
postnas_begin
(exit ${CODE:-0})
exit $?
"""


@pytest.fixture
def slurm(tmp_path):
    """Run the batch part with an exit code of the step; returns exit code and output."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, body in FAKES.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    stage = tmp_path / "run" / "stages" / "stage1"
    base = {
        "PATH": f"{bin_dir}:/usr/bin:/bin",
        "FAKE": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "POSTNAS_RUN_DIR": str(tmp_path / "run"),
        "POSTNAS_CODE": str(ROOT),
        "POSTNAS_JOB": "stage1",
        "POSTNAS_TARGET": "stage1",
        "POSTNAS_STATE_DIR": str(stage),
        "POSTNAS_LOG_DIR": str(stage / "logs"),
        "POSTNAS_RESTARTS": "1",
        "POSTNAS_PREFLIGHT": "0",
        "POSTNAS_PREFLIGHT_TIMEOUT": "9",
        "POSTNAS_PREFLIGHT_REQUEUES": "1",
        "POSTNAS_STEP_SCRIPT": "/dev/null",
    }

    class Slurm:
        calls_file = tmp_path / "calls"
        state_file = tmp_path / "state"
        progress = stage / "checkpoints"
        log = tmp_path / "run" / "cluster" / "attempts" / "stage1.log"

        def finish(self, target: str = "stage1") -> None:
            """The result of the stage, or of a candidate."""
            name, _, candidate = target.partition(":")
            folder = stage.parent / name / "jobs" / candidate if candidate else stage.parent / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text("{}")

        @property
        def lines(self) -> list[str]:
            return self.log.read_text().splitlines()

        @property
        def notes(self) -> list[str]:
            """Event, exit code and words of every line in cluster/attempts, oldest first."""
            rows = [line.split(maxsplit=5) for line in self.log.read_text().splitlines()]
            return [f"{row[1]} {row[5]}" for row in rows]

        def attempt(self, restart: int, code: int, state: str = "RUNNING", script: str = JOB, **extra: str):
            self.state_file.write_text(state + "\n")
            self.calls_file.write_text("")
            environment = {**base, "SLURM_RESTART_COUNT": str(restart), "CODE": str(code), **extra}
            return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=250)

        @property
        def requeued(self) -> bool:
            return "requeue 7" in self.calls_file.read_text()

        def processes(self) -> list[str]:
            """Command lines of what an attempt has left running."""
            left = []
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    if f"FAKE={tmp_path}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        left.append((entry / "cmdline").read_text())
                except OSError:
                    continue
            return left

        @property
        def calls(self) -> str:
            return self.calls_file.read_text()

    return Slurm()


def checkpoint(slurm, step: int) -> None:
    (slurm.progress / f"step-{step}").mkdir(parents=True)


def test_success_is_left_alone(slurm):
    slurm.finish()
    done = slurm.attempt(0, 0)
    assert done.returncode == 0
    assert not slurm.requeued


def test_interruption_is_queued_again(slurm):
    assert slurm.attempt(0, 75).returncode == 75
    assert slurm.requeued


GREETING = "*** Site news ***\\nRUNNING jobs: 3\\nNodeAddr=1.2.3.4 EndTime=2001-01-01T00:00:00 ExcNodeList=n7\\n"


@pytest.mark.parametrize("name", ["SQUEUE_STATES", "SQUEUE_PARTITION", "SLURM_CLUSTERS"])
@pytest.mark.parametrize("when", ["inherited", "set by a module"])
def test_filters_of_the_user_do_not_hide_the_job_from_itself(slurm, name, when):
    if when == "inherited":
        slurm.attempt(0, 75, **{name: "PD"})
    else:
        slurm.attempt(0, 75, script=JOB.replace("postnas_begin", f"export {name}=PD\npostnas_begin"))
    assert slurm.requeued


def test_greetings_of_slurms_commands_are_overheard(slurm):
    marks = preflight("n1.ok:", "n2.bad:GPU 3 is gone") + "; exit 1"
    slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks, FAKE_EXCLUDED="n9", FAKE_GREETING=GREETING)
    assert "update JobId=7 ExcNodeList=n9,n2" in slurm.calls
    shown = JOB.replace("(exit ${CODE:-0})", 'echo "at $MASTER_ADDR:$MASTER_PORT until $postnas_end"; exit 75')
    done = slurm.attempt(1, 75, script=shown, FAKE_GREETING=GREETING)
    assert "at 10.0.0.7:15007 until " in done.stdout and "until 978" not in done.stdout
    assert slurm.requeued


def test_answers_in_colours_and_with_carriage_returns_are_read(slurm):
    for name in ("squeue", "scontrol"):
        tool = slurm.state_file.parent / "bin" / name
        tool.rename(tool.with_name(f"plain-{name}"))
        tool.write_text(f"#!/bin/bash\nplain-{name} \"$@\" | sed $'s/^/\\e[1;32m/; s/$/\\e(B\\e[m\\r/'\n")
        tool.chmod(0o755)
    script = JOB.replace("(exit ${CODE:-0})", 'echo "at $MASTER_ADDR"; exit 75')
    assert "at 10.0.0.7\n" in slurm.attempt(0, 75, script=script, SLURM_JOB_NODELIST="n[1-2]").stdout
    assert slurm.requeued


def test_words_that_are_no_state_are_no_end(slurm):
    """scontrol is asked then."""
    cases = (("", "RUNNING", True), ("news: RUNNING late", "RUNNING", True), ("", "CANCELLED", False))
    for state, second, requeued in cases:
        slurm.attempt(0, 75, state=state, FAKE_SECOND=f"JobState={second}")
        assert slurm.requeued == requeued, (state, second)


# Time that passes only where somebody sleeps; the time limit is ten minutes away.
CLOCK = """
passed=0
sleep() { passed=$((passed + ${1%.*})); }
date() { if [ "$*" = +%s ]; then echo $((4070908200 + passed)); else command date "$@"; fi; }
"""
TEN_MINUTES = {"FAKE_END": "2099-01-01T00:00:00", "TZ": "UTC"}


def test_controller_that_is_away_for_long_is_waited_for(slurm):
    (slurm.state_file.parent / "away").write_text("8")
    done = slurm.attempt(0, 75, script=CLOCK + JOB, **TEN_MINUTES)
    assert slurm.requeued
    assert done.stdout.count("Slurm does not answer; waiting for it") == 1


def test_controller_that_stays_away_is_given_up_before_the_time_limit(slurm):
    (slurm.state_file.parent / "away").write_text("1000")
    shown = "postnas_begin\nexit() { echo passed $passed; builtin exit $1; }\n"
    done = slurm.attempt(0, 75, script=CLOCK + JOB.replace("postnas_begin\n", shown), **TEN_MINUTES)
    assert done.returncode == 75 and not slurm.requeued
    assert "Slurm does not answer and the time limit is near" in done.stdout
    passed = int(done.stdout.rpartition("passed ")[2].split()[0])
    assert 600 - 20 - 30 <= passed < 600 - 20, "ten minutes, less the guard's seconds"


def test_job_that_slurm_has_forgotten_is_not_waited_for(slurm):
    fake = slurm.state_file.parent / "bin" / "squeue"
    fake.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    done = slurm.attempt(0, 75)
    assert "Slurm is ending this job (gone)" in done.stdout and not slurm.requeued


@pytest.mark.parametrize("target", ["stage1", "stage1:jet"])
def test_exit_code_0_without_a_result_is_a_crash(slurm, target):
    """srun returns it, too, when it loses a node."""
    state_dir = str(slurm.progress.parent / "jobs" / "jet") if ":" in target else str(slurm.progress.parent)
    where = {"POSTNAS_TARGET": target, "POSTNAS_STATE_DIR": state_dir}
    done = slurm.attempt(0, 0, **where)
    assert (done.returncode, slurm.requeued) == (1, True)
    assert slurm.notes[-1] == "end 1 ended without an error and without a result"
    slurm.finish(target)
    assert slurm.attempt(1, 0, **where).returncode == 0
    assert slurm.notes[-1] == "end 0 done"


def test_lost_node_is_no_crash_of_the_stage(slurm):
    for restart in range(3):
        slurm.attempt(restart, 0, state="COMPLETING")
        assert slurm.notes[-1] == "end 75 ended by Slurm in set-up (modules, setup) (exit code 1)"
    assert not any(note.startswith("failed") for note in slurm.notes)


def test_sigterm_is_no_crash(slurm):
    """A worker that cannot save within the grace time."""
    script = JOB.replace("(exit ${CODE:-0})", "kill $$; (exit 143)")
    for restart in range(3):
        assert slurm.attempt(restart, 0, script=script).returncode == 143
        assert slurm.requeued


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
def test_a_job_that_slurm_is_ending_is_not_brought_back(slurm, state):
    done = slurm.attempt(0, 75, state=state)
    assert done.returncode == 75
    assert not slurm.requeued
    assert "not queued again" in done.stdout


def test_crashes_without_progress_come_to_an_end(slurm):
    assert slurm.attempt(0, 1).returncode == 1
    assert slurm.requeued
    done = slurm.attempt(1, 1)
    assert not slurm.requeued
    assert "giving up: crashed with exit code 1, 2 times without progress" in done.stdout


def test_crashes_with_progress_go_on(slurm):
    for restart in range(5):
        checkpoint(slurm, restart)
        assert slurm.attempt(restart, 1).returncode == 1
        assert slurm.requeued, f"restart {restart} had a new checkpoint"
    slurm.attempt(5, 1)
    assert not slurm.requeued, "the second crash at this checkpoint"


def test_logs_and_status_are_no_progress(slurm):
    for restart in range(2):
        slurm.progress.parent.mkdir(parents=True, exist_ok=True)
        for name in (f"events.{restart}.log", "status.json", "metrics.jsonl", f".result.json.{restart}"):
            (slurm.progress.parent / name).write_text(str(restart))
        slurm.attempt(restart, 1)
    assert not slurm.requeued


def test_interruptions_do_not_count_as_crashes(slurm):
    for restart in range(6):
        slurm.attempt(restart, 75)
        assert slurm.requeued
    slurm.attempt(6, 1)
    assert slurm.requeued, "the first crash"


def test_endless_interruptions_without_progress_come_to_an_end(slurm):
    for restart in range(11):
        slurm.attempt(restart, 75)
    assert not slurm.requeued
    # Killed attempts leave no end behind; starting is enough to see them.
    killed = JOB.replace("(exit ${CODE:-0})", "kill -KILL $$")
    for _ in range(2):
        done = slurm.attempt(11, 0, script=killed)
    assert "giving up: interrupted" in done.stdout


@pytest.mark.parametrize("code", [0, 3, 75])
def test_attempt_that_was_thought_dead_changes_nothing(slurm, code):
    """The next attempt has begun meanwhile; queueing the job again would end it."""
    meanwhile = 'echo "1 start 7 1 0-0 2 n[1-2]" >> "$POSTNAS_RUN_DIR/cluster/attempts/stage1.log"'
    old = slurm.attempt(0, code, script=JOB.replace("postnas_begin", f"postnas_begin\n{meanwhile}"))
    assert "another attempt has taken over" in old.stdout and old.returncode == code
    assert not slurm.requeued and slurm.notes[-1].startswith("start")
    assert slurm.attempt(1, 75).returncode == 75 and slurm.requeued  # the newer one decides as ever


def test_usage_errors_are_final(slurm):
    assert slurm.attempt(0, 2).returncode == 2
    assert not slurm.requeued


@pytest.mark.parametrize("late", [False, True])
def test_job_that_cannot_count_its_restarts_gives_up(slurm, late):
    """A full disk would otherwise have it queued again for ever."""
    attempts = slurm.state_file.parent / "run" / "cluster" / "attempts"
    lose = f'rm -rf "{attempts}"; mkdir -p "{attempts.parent}"; touch "{attempts}"'
    script = JOB.replace("(exit", f"{lose}; (exit") if late else f"{lose}\n{JOB}"
    done = slurm.attempt(0, 1, script=script)
    assert done.returncode == 1
    assert f"giving up: cannot write {attempts}/stage1.log" in done.stdout
    assert not slurm.requeued


def test_another_submission_starts_counting_anew(slurm):
    slurm.attempt(0, 1)
    slurm.attempt(1, 1)
    assert not slurm.requeued
    slurm.attempt(0, 1, SLURM_JOB_ID="7")
    assert not slurm.requeued
    slurm.attempt(0, 1, SLURM_JOB_ID="8")
    assert "requeue 8" in slurm.calls


# A SIGTERM that comes just before a shell waits in `read` is as good as lost until the read is over.
DEAF = 'read() { if [ "$2" = -t ]; then trap "" TERM; fi; builtin read "$@"; }\n'
# For those who ask `date`, the limit is 21 seconds away; the guard's own clock has long passed it.
SOON = 'date() { if [ "$*" = +%s ]; then echo 1577836779; else command date "$@"; fi; }\npostnas_enter'
LIMIT = {"FAKE_END": "2020-01-01T00:00:00", "TZ": "UTC"}


@pytest.mark.parametrize("before", ["", DEAF], ids=["", "deaf"])
@pytest.mark.parametrize("code", [0, 75])
def test_clock_guard_leaves_no_process_behind(slurm, before, code):
    slurm.finish()
    assert slurm.attempt(0, code, script=before + JOB).stderr == "", "nothing about a process that was killed"
    assert slurm.processes() == []


def test_clock_guard_of_a_script_that_was_killed_queues_nothing_and_leaves(slurm):
    look = "postnas_guard_look=1\npostnas_enter"
    script = JOB.replace("postnas_enter", look).replace("(exit ${CODE:-0})", "kill -KILL $$")
    assert slurm.attempt(0, 0, script=script).returncode == -9
    assert not slurm.requeued
    assert slurm.processes() == []


def test_clock_guard_queues_a_job_again_that_missed_the_warning(slurm):
    late = 'until grep -q PENDING "$FAKE/state"; do sleep 0.1; done; (exit 143)'
    done = slurm.attempt(0, 0, script=JOB.replace("postnas_enter", SOON).replace("(exit ${CODE:-0})", late), **LIMIT)
    assert done.returncode == 143
    assert slurm.calls.count("requeue 7") == 1
    assert "the time limit is 20 seconds away, in set-up (modules, setup); queueing again" in done.stdout


def preflight(*marks: str) -> str:
    """A step that leaves files in the preflight directory, and its exit code."""
    return "; ".join(
        f'echo "{text}" > "$POSTNAS_PREFLIGHT_DIR/{name}"' for name, _, text in (m.partition(":") for m in marks)
    )


def test_bad_node_is_excluded_and_the_job_queued_again(slurm):
    marks = preflight("n1.ok:", "n2.bad:GPU 3 is gone") + "; exit 1"
    done = slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks, FAKE_EXCLUDED="n9")
    assert done.returncode == 75
    assert "preflight failed: n2: GPU 3 is gone; queueing again without n2" in done.stdout
    assert "update JobId=7 ExcNodeList=n9,n2" in slurm.calls


def test_silent_node_is_the_bad_one(slurm):
    slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=preflight("n1.ok:") + "; exit 1")
    assert "ExcNodeList=n2" in slurm.calls


def test_when_no_node_answers_none_is_blamed(slurm):
    done = slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN="exit 1")
    assert "no single node to blame" in done.stdout
    assert slurm.requeued
    assert "ExcNodeList" not in slurm.calls


def test_what_all_nodes_have_in_common_is_no_nodes_fault(slurm):
    marks = preflight("n1.bad:0.5 GiB free", "n2.bad:0.5 GiB free") + "; exit 1"
    done = slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    reason = "no single node to blame, all 2 are bad; n1: 0.5 GiB free"
    assert f"preflight failed: {reason}; queueing again without excluding a node" in done.stdout
    assert slurm.requeued
    assert "ExcNodeList=n" not in slurm.calls
    done = slurm.attempt(1, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    assert done.returncode == 1
    assert f"giving up: preflight failed 2 times, now: {reason}" in done.stdout
    assert not slurm.requeued


ALONE = {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "FAKE_NODES": "n1", "POSTNAS_PREFLIGHT": "1"}


@pytest.mark.parametrize("code", [126, 127])
def test_a_command_that_cannot_be_run_is_no_nodes_fault(slurm, code):
    step = f"echo; echo '/v/bin/python: No such file or directory'; echo; exit {code}"
    done = slurm.attempt(0, 0, FAKE_SRUN=step, **ALONE)
    assert f"no single node to blame, n1: left with exit code {code}: /v/bin/python: No such file" in done.stdout
    assert "ExcNodeList=n" not in slurm.calls
    # Where the same command runs on another node, the node that lacks it is the bad one.
    done = slurm.attempt(1, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=f"{preflight('n1.ok:')}; {step}")
    assert f"n2: left with exit code {code}: /v/bin/python" in done.stdout


def test_reason_is_what_the_check_said_unless_its_time_ran_out(slurm):
    done = slurm.attempt(0, 0, FAKE_SRUN="echo Bus error; exit 135", **ALONE)
    assert "n1: left with exit code 135: Bus error; queueing again without n1" in done.stdout
    # The step gets a minute more than the check.
    late = slurm.attempt(1, 0, FAKE_SRUN="exec sleep 60", POSTNAS_PREFLIGHT_TIMEOUT="-58", **ALONE)
    assert "n1: no answer within -58 seconds" in late.stdout


def test_job_that_no_node_is_left_for_gives_up(slurm):
    marks = preflight("n1.ok:", "n2.bad:disk is full") + "; exit 1"
    refusal = "Requested node configuration is not available"
    done = slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks, FAKE_EXCLUDED="n9", FAKE_REFUSAL=refusal)
    assert done.returncode == 1
    assert "giving up: preflight failed: n2: disk is full; the other nodes are too few for this job" in done.stdout
    assert "sbatch --test-only --nodes=2 --comment=a b --exclude=n9,n2 --wrap=true" in slurm.calls
    assert not slurm.requeued
    silent_site = {"FAKE_REFUSAL": "Access denied", "SLURM_JOB_ID": "8"}
    assert slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks, **silent_site).returncode == 75
    assert "requeue 8" in slurm.calls


def test_progress_forgives_failed_preflights(slurm):
    marks = preflight("n1.ok:", "n2.bad:disk is full") + "; exit 1"
    for restart in range(4):
        slurm.attempt(2 * restart, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
        assert slurm.requeued, f"bad node number {restart + 1}, each after a new checkpoint"
        checkpoint(slurm, restart)
        slurm.attempt(2 * restart + 1, 75)
    slurm.attempt(8, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    done = slurm.attempt(9, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    assert "giving up: preflight failed 2 times" in done.stdout


def test_preflight_failures_have_a_limit(slurm):
    marks = preflight("n1.ok:", "n2.bad:disk is full") + "; exit 1"
    slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    done = slurm.attempt(1, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    assert done.returncode == 1
    assert "giving up: preflight failed 2 times, now: n2: disk is full" in done.stdout
    assert not slurm.requeued


def test_packages_that_cannot_work_end_the_job_without_blaming_a_node(slurm):
    marks = preflight("n1.ok:", "n2.ok:", "all.unfit:megatron-core 0.15.0 is installed") + "; exit 2"
    done = slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    assert done.returncode == 2
    assert "giving up: preflight: megatron-core 0.15.0 is installed" in done.stdout
    assert not slurm.requeued and "ExcNodeList" not in slurm.calls


TERMINATED = {
    "by_the_trap": "kill $PPID; exit 1",
    "by_the_trap_after_a_mark": preflight("n1.ok:") + "; kill $PPID; exit 0",
    "step_alone": "exit 143",
    "step_killed": "exit 137",
    "one_node_done": preflight("n1.ok:") + "; exit 143",
}


@pytest.mark.parametrize("case", TERMINATED)
def test_preemption_in_preflight_blames_nobody_and_counts_as_an_interruption(slurm, case):
    """Slurm calls the job RUNNING for all of its grace time."""
    wait = "for i in 1 2 3 4 5 6 7 8 9 10; do :; done; "
    step = TERMINATED[case].replace("kill $PPID", 'kill "$JOB_PID"')
    script = "export JOB_PID=$$\n" + JOB
    for restart in range(3):
        done = slurm.attempt(restart, 0, script=script, POSTNAS_PREFLIGHT="1", FAKE_SRUN=wait + step)
        assert done.returncode == 75, done.stdout
        assert slurm.requeued and "ExcNodeList=" not in slurm.calls
        assert slurm.notes[-1].startswith("end 75 ended by Slurm in preflight")
    assert "giving up" not in done.stdout


def test_node_that_says_it_is_bad_is_believed_whatever_ends_the_step(slurm):
    marks = preflight("n1.ok:", "n2.bad:disk is full") + "; exit 143"
    slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=marks)
    assert "ExcNodeList=n2" in slurm.calls


@pytest.mark.parametrize("line, code", [("exit 3", 3), ("false; exit", 1)])
def test_set_up_that_ends_the_script_is_a_crash_with_a_name(slurm, line, code):
    script = JOB.replace("postnas_begin", f"{line}\npostnas_begin")
    assert slurm.attempt(0, 0, script=script).returncode == code
    assert slurm.notes[-1] == f"end {code} set-up left with exit code {code}" and slurm.requeued
    done = slurm.attempt(1, 0, script=script)
    assert f"giving up: set-up left with exit code {code}, 2 times without progress" in done.stdout
    assert not slurm.requeued


def test_set_up_that_hangs_until_the_time_limit_is_queued_again_and_named(slurm):
    """And comes to an end."""
    hang = 'until grep -q PENDING "$FAKE/state"; do sleep 0.1; done; kill -KILL $$'
    script = JOB.replace("postnas_enter", SOON).replace("postnas_begin", f"{hang}\npostnas_begin")
    assert slurm.attempt(0, 0, script=script, **LIMIT).returncode == -9
    assert slurm.requeued
    assert slurm.notes[-1] == "limit 75 the time limit came in set-up (modules, setup)"
    with slurm.log.open("a") as log:
        log.write("".join(line.replace(" 7 0 ", f" 7 {i} ") + "\n" for i in range(1, 12) for line in slurm.lines))
    done = slurm.attempt(12, 0)
    assert "without progress, last: the time limit came in set-up (modules, setup)" in done.stdout
    assert "giving up: interrupted" in done.stdout and not slurm.requeued


def test_full_disk_is_named(slurm):
    """A folder in the way of the test file stands for it: it cannot be written either."""
    fake = slurm.state_file.parent / "bin" / "dd"
    fake.write_text("#!/bin/bash\necho \"dd: error writing 'x': No space left on device\" >&2; exit 1\n")
    fake.chmod(0o755)
    slurm.attempt(0, 1)
    run = slurm.state_file.parent / "run"
    assert slurm.notes[-1] == f"end 1 crashed with exit code 1 (no space left in {run})"
    fake.write_text("#!/bin/bash\necho \"dd: failed to open 'x': Read-only file system\" >&2; exit 1\n")
    done = slurm.attempt(1, 1)
    assert f"crashed with exit code 1 (cannot write in {run}: Read-only file system), 2 times" in done.stdout
    fake.unlink()
    slurm.attempt(0, 1, SLURM_JOB_ID="8")
    assert slurm.notes[-1] == "end 1 crashed with exit code 1"
    assert list(run.glob(".space*")) == []


def test_good_preflight_lets_the_stage_start(slurm):
    slurm.finish()
    done = slurm.attempt(0, 0, POSTNAS_PREFLIGHT="1", FAKE_SRUN=preflight("n1.ok:", "n2.ok:"))
    assert done.returncode == 0, done.stdout


def test_rendezvous_is_the_head_nodes_address_and_a_port_of_the_job(slurm):
    script = JOB.replace("(exit ${CODE:-0})", 'echo "at $MASTER_ADDR:$MASTER_PORT"')
    assert "at 10.0.0.7:15007" in slurm.attempt(0, 0, script=script).stdout


STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n2",
    "SLURM_JOB_ID": "7",
    "POSTNAS_NPROC": "4",
    "POSTNAS_JOB": "stage1",
    "POSTNAS_TARGET": "stage1",
    "POSTNAS_CODE": str(ROOT),
    "POSTNAS_WORKER": "jet_launcher.exit_codes",
}


def test_python_may_lie_in_a_path_with_spaces(tmp_path):
    folder = tmp_path / "my venv"
    folder.mkdir()
    (folder / "python").write_text('#!/bin/sh\necho "here $1"\n')
    (folder / "python").chmod(0o755)
    python = str(folder / "python")
    assert step(tmp_path, python).stdout == "here -m\n"
    done = step(tmp_path, python, POSTNAS_STEP="preflight")
    assert done.stdout == f"here {ROOT}/slurm/preflight.py\n"


def step(tmp_path, python: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **STEP, "POSTNAS_RUN_DIR": str(tmp_path), "POSTNAS_CWD": str(tmp_path)}
    environment |= {"POSTNAS_LOG_DIR": str(tmp_path), "POSTNAS_PYTHON": python, **extra}
    return subprocess.run(
        ["bash", "-c", 'source "$POSTNAS_CODE/slurm/step.sh"'],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_every_process_knows_its_rank_and_logs_beside_its_node(tmp_path):
    shown = tmp_path / "show"
    shown.write_text('#!/bin/bash\necho "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $*"; trap; exit 75\n')
    shown.chmod(0o755)
    done = step(tmp_path, str(shown))
    assert done.returncode == 75, "the worker's own exit code"
    assert done.stdout.startswith(f"5 8 1 4 -m jet_launcher.exit_codes {tmp_path} stage1\n")
    assert "SIGUSR1" in done.stdout, "ignored until the worker has a handler"
    assert (tmp_path / "stage1.7.0.n2.log").read_text() == done.stdout


def test_shipped_code_wins_over_the_working_directory(tmp_path):
    (tmp_path / "jet_launcher").mkdir()
    (tmp_path / "jet_launcher" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    assert step(tmp_path, "python3").returncode == 0
