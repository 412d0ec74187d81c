"""Whatever a site's wrappers print and a user's variables say: the answer is found, or there is one line and no job."""

import json
import re

import pytest

from jet_launcher.cli import main
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm import state
from jet_launcher.slurm.ask import plain_environment, shell_words, submitted_id
from jet_launcher.slurm.record import read_record
from megatron_jet.configs.errors import UserError

GREETING = "*** Welcome to Example HPC ***\n--> account ok: 12 of 50 node-hours, 11 jobs\n"
# What sbatch prints, and the job ID in it (None: cannot be told).
PRINTED = {
    "bare": ("11\n", "11"),
    "banner_before": (f"{GREETING}11\n", "11"),
    "line_after": ("11\nquota: 3 jobs left\n", "11"),
    "both": (f"{GREETING}\n  11  \r\n{GREETING}", "11"),
    "coloured": ("\x1b[1;32mhello\x1b[0m\n\x1b[0m11\n", "11"),
    "cluster": ("11;gpu-cluster\n", "11;gpu-cluster"),
    "cluster_after_banner": (f"{GREETING}11;gpu\n", "11;gpu"),
    "without_parsable": ("Submitted batch job 11\n", "11"),
    "without_parsable_elsewhere": ("Submitted batch job 11 on cluster gpu\n", "11;gpu"),
    "said_twice": ("11\n11\n", "11"),
    "said_in_two_ways": ("Submitted batch job 11 on cluster gpu\n11\n", "11;gpu"),
    "terminal_codes": ("\x1b]0;hpc\x07\x1b[?25hhello\n\x1b(B\x1b[m11\x1b(B\n", "11"),
    "nothing": ("", None),
    "greeting_alone": (GREETING, None),
    "two_numbers": ("2026\n11\n", None),
    "two_clusters": ("11;a\n11;b\n", None),
    "in_a_sentence": ("your job is 11\n", None),
    "shell_in_cluster": ("11;$(touch pwned)\n", None),
    "zero": ("0\n", None),
}


@pytest.mark.parametrize("case", PRINTED)
def test_job_id_is_the_one_line_that_fits(case):
    said, job_id = PRINTED[case]
    assert submitted_id(said) == job_id


FOUND = [case for case in PRINTED if PRINTED[case][1]]


@pytest.mark.parametrize("after", ["", ";gpu"])
def test_jobs_of_a_run_are_managed_whatever_sbatch_prints(place, capsys, after):
    """Through NeMo-Run, which takes all that is printed for the number and gives it to a shell."""
    place.slurm.steer(says=f"{GREETING}ID{after}")
    code, out, err = place.call(*place.arguments())
    assert (code, err) == (0, "")
    assert [row["job_id"] for row in place.record["submissions"][0]["jobs"]] == [f"{n}{after}" for n in (11, 12, 13)]
    options = [(place.slurm.folder / "options" / str(number)).read_text() for number in (12, 13)]
    assert [re.search(r"--dependency=(\S+)", text).group(1) for text in options] == ["afterok:11", "afterok:12"]
    assert main(["cancel", "a"]) == 0
    assert "3 jobs cancelled" in capsys.readouterr().out
    where = "--clusters=gpu " if after else ""
    assert place.slurm.said("cancelled") == f"{where}13 12 11\n"
    assert all(("--clusters=gpu" in line) == bool(after) for line in place.slurm.said("asked").splitlines())


@pytest.mark.parametrize("case", FOUND)
def test_plain_script_prints_the_number_alone(place, capsys, case):
    said, job_id = PRINTED[case]
    place.slurm.steer(says=said.rstrip("\n"))
    assert place.plain() == 0
    assert capsys.readouterr().out == "11\n"
    assert place.record["submissions"][0]["jobs"][0]["job_id"] == job_id


@pytest.mark.parametrize("case", ["greeting_alone", "two_numbers", "shell_in_cluster"])
def test_answer_without_a_job_id_is_one_line_and_the_job_is_taken_back(place, capsys, case):
    said, _ = PRINTED[case]
    place.slurm.steer(says=said.rstrip("\n"))
    assert place.plain() == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(
        "error: submission failed: sbatch printed no job ID that can be told"
    )
    assert " ".join(said.split()) in err and "; 1 jobs were taken back" in err
    assert place.slurm.states() == {"11": "CANCELLED"}
    assert place.record["submissions"] == []


def test_nothing_unchecked_reaches_the_next_sbatch(place):
    place.slurm.steer(says=f"{GREETING}$(touch {place.folder}/pwned); touch {place.folder}/pwned")
    code, out, err = place.call(*place.arguments())
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "error: submission failed: sbatch printed no job ID" in err and "; 1 jobs were taken back" in err
    assert place.slurm.states() == {"11": "CANCELLED"}, "no second one"
    assert not (place.folder / "pwned").exists()


def test_greeting_in_another_encoding_hides_no_job(place, capsys):
    (place.slurm.folder / "says").write_bytes("Universit\xe4t\nID\n".encode("latin-1"))
    assert place.plain() == 0
    assert capsys.readouterr().out == "11\n"


def test_coloured_answers_of_the_other_commands_are_read(place, capsys):
    assert place.plain() == 0
    colour = place.slurm.bin / "colour"
    colour.write_text("#!/bin/bash\nsed -e $'s/^/\\e[1;32m/' -e $'s/$/\\e(B\\e[m\\r/'\n")
    colour.chmod(0o755)
    for name in ("squeue", "scontrol", "sacct"):
        plain = place.slurm.bin / name
        plain.rename(place.slurm.bin / f"plain-{name}")
        plain.write_text(f'#!/bin/bash\nplain-{name} "$@" | colour\nexit "${{PIPESTATUS[0]}}"\n')
        plain.chmod(0o755)
    place.slurm.add("11", "RUNNING", nodes="n1")
    assert place.plain() == 1
    assert "is in the queue or running (job 11)" in capsys.readouterr().err
    assert main(["cancel", "a"]) == 0
    assert place.slurm.states() == {"11": "CANCELLED"}


def test_refused_plain_job_leaves_no_run_directory(place, capsys, monkeypatch):
    for stage in ("nostage", "stage1:x", "stage1"):
        if stage == "stage1":
            monkeypatch.setenv("PATH", str(place.folder))  # no sbatch there
        assert place.plain(stage) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1
        assert not place.run.parent.exists(), stage


def test_text_on_stderr_does_no_harm(place, capsys):
    place.slurm.steer(warns=GREETING + "99")
    assert place.plain() == 0
    assert capsys.readouterr().out == "11\n"


def test_record_with_text_for_an_id_is_refused(place, capsys):
    assert place.plain() == 0
    file = place.run / "cluster" / "experiment.json"
    file.write_text(file.read_text().replace('"11"', '"*** Site news\\n11"'))
    with pytest.raises(UserError, match="is not a complete record of submitted jobs"):
        read_record(RunDirectory(place.run))


STEERING = {
    "SQUEUE_PARTITION": "other", "SQUEUE_USERS": "nobody", "SQUEUE_STATES": "PD", "SQUEUE_NEW_FILTER": "x",
    "SACCT_FEDERATION": "1", "SCANCEL_STATE": "RUNNING", "SCONTROL_ALL": "1", "SLURM_CLUSTERS": "other",
    "SLURM_TIME_FORMAT": "relative", "SALLOC_PARTITION": "x", "SBATCH_PARTITION": "x", "SRUN_X": "y",
}  # fmt: skip


def test_variables_of_the_user_decide_nothing_and_do_not_reach_the_job(place, capsys, monkeypatch):
    for name, value in {**STEERING, "SLURM_CONF": "/etc/slurm.conf", "MINE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place.plain() == 0
    place.slurm.add("11", "RUNNING", nodes="n1")
    inherited = dict(
        line.split("=", 1)
        for line in (place.slurm.folder / "environment" / "11").read_text().splitlines()
        if "=" in line
    )
    assert not set(STEERING) & set(inherited)
    assert (inherited["SLURM_CONF"], inherited["MINE"]) == ("/etc/slurm.conf", "1")
    assert place.plain() == 1, "the same stage again"
    assert "is in the queue or running (job 11)" in capsys.readouterr().err
    main(["status", "a"])
    assert capsys.readouterr().out.splitlines()[3].split()[:4] == ["stage1", "running", "11", "n1"]
    assert main(["cancel", "a"]) == 0
    assert place.slurm.states() == {"11": "CANCELLED"}


def test_plain_environment_keeps_what_is_not_slurms_and_where_slurm_is():
    kept = {"PATH": "/bin", "SLURM_CONF": "c", "SLURM_JWT": "t", "MY_SLURM_X": "1"}
    assert plain_environment({**STEERING, **kept}) == kept


def test_greetings_of_the_other_commands_are_overheard(place, capsys):
    assert place.plain() == 0
    place.slurm.add("11", "RUNNING", nodes="n1")
    place.slurm.steer(greets=GREETING + "a|b|c|d|e\nx|RUNNING|None|n9|N/A\na|b|c|d|e|f\nJobId=11\n12|DONE|x|y|z|z")
    assert place.plain() == 1
    assert "is in the queue or running (job 11)" in capsys.readouterr().err
    main(["status", "a", "--json"])
    [job] = json.loads(capsys.readouterr().out)["jobs"]
    assert (job["state"], job["job_id"], job["nodes"]) == ("running", "11", "n1")
    assert main(["cancel", "a"]) == 0


def test_job_that_squeue_leaves_out_is_looked_up_before_it_counts_as_gone(place, capsys):
    """A filter in a wrapper, say: `resume` would submit a second worker for the same directory."""
    assert place.plain() == 0 and place.plain("stage2") == 0
    place.slurm.add("11", "RUNNING", nodes="n1")
    for blind in ("11", "11\n12"):
        place.slurm.steer(blind=blind)
        capsys.readouterr()
        assert place.plain() == 1
        assert "stage1 is in the queue or running (job 11)" in capsys.readouterr().err
    assert main(["cancel", "a"]) == 0
    assert place.slurm.states() == {"11": "CANCELLED", "12": "CANCELLED"}


def test_accounting_is_asked_from_the_start_of_the_run_on(place):
    """Slurm counts its jobs anew some day; older ones of the same number are somebody else's hours."""
    assert place.plain() == 0
    main(["status", "a"])
    assert re.search(
        r"--starttime=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d --jobs=11 ", place.slurm.said("accounted").splitlines()[-1]
    )


def test_jobs_of_two_clusters_are_asked_for_and_cancelled_where_they_are(place):
    place.slurm.add("11", "RUNNING", nodes="n1")
    jobs = state.query_jobs(["11;east", "11;west", "11"])
    assert {job_id: (job.job_id, job.state) for job_id, job in jobs.items()} == {i: (i, "running") for i in jobs}
    asked = place.slurm.said("asked").splitlines()
    assert [line.split()[0] for line in asked] == ["--clusters=east", "--clusters=west", "--noheader"]
    state.cancel_jobs(["12;east", "11;east", "11"])
    assert place.slurm.said("cancelled") == "--clusters=east 12 11\n11\n"
    assert shell_words("scancel", ["12;east", "11;east", "9"]) == "scancel -M east 12 11; scancel 9"


def test_jobs_wait_for_the_number_of_one_that_is_in_the_queue(place, monkeypatch):
    """sbatch knows no `;cluster` there, and a shell ends the command at it."""
    place.slurm.steer(says="ID;gpu")
    assert place.plain("prepare") == 0
    asked = []

    def submit(graph, cluster, where, title, waits_for, keep):
        asked.append(waits_for)
        raise UserError("seen")

    monkeypatch.setattr("jet_launcher.slurm.launch.submit", submit)
    assert main(["resume", "a"]) == 1
    [waits_for] = asked
    assert "11" in sum(waits_for.values(), []) and set(sum(waits_for.values(), [])) == {"11"}
