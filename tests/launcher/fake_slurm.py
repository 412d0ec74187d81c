"""Slurm's commands as shell scripts over a directory of job files: what the launcher asks and does, in milliseconds."""

import os
import stat
from pathlib import Path

SCRIPTS = {
    # Takes the job, then answers: `refused`, `lost` and `slow` hold the number of a call, `says` what it prints for ID.
    "sbatch": """
echo x >> $S/calls; n=$(wc -l < $S/calls); id=$((10 + n)); env > $S/environment/$id
if [ "$(cat $S/refused 2> /dev/null)" = $n ]; then echo 'sbatch: error: Invalid qos specification' >&2; exit 1; fi
echo "${!#}" > $S/scripts/$id; echo "$*" > $S/options/$id
echo "PENDING|$(cat $S/reason 2> /dev/null)||N/A" > $S/jobs/$id
if [ "$(cat $S/lost 2> /dev/null)" = $n ]; then echo 'sbatch: error: Socket timed out' >&2; exit 1; fi
if [ "$(cat $S/slow 2> /dev/null)" = $n ]; then touch $S/here; until [ -e $S/go ]; do sleep 0.05; done; fi
[ ! -e $S/warns ] || cat $S/warns >&2
if [ -e $S/says ]; then sed "s/ID/$id/g" $S/says; else echo $id; fi""",
    # Knows nothing that matches a user's filter; `greets` comes before every answer, `blind` holds IDs it leaves out.
    "squeue": """
echo "$*" >> $S/asked
if env | grep -qE '^(SQUEUE_|SLURM_CLUSTERS)'; then exit 0; fi
[ ! -e $S/greets ] || cat $S/greets
if [ -e $S/silent ]; then echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1; fi
found=
for file in $S/jobs/*; do
    [ -e "$file" ] || continue
    found=1; id=${file##*/}
    ! grep -qxF $id $S/blind 2> /dev/null || continue
    case "$*" in
        *%o*) grep -q '^CANC' $file || echo "$id|$(cat $S/scripts/$id)" ;;
        *) echo "$id|$(cat $file)" ;;
    esac
done
[ -z "$found" ] && [[ "$*" = *--jobs=* ]] || exit 0
echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1""",
    "scontrol": """
if [ -e $S/greets ]; then cat $S/greets; fi
for file in $S/jobs/*; do
    IFS='|' read -r state reason nodes _ < $file
    echo "JobId=${file##*/} JobName=x UserId=me(1) JobState=$state Reason=$reason NodeList=${nodes:-(null)} Command=x"
done""",
    "sacct": 'echo "$*" >> $S/accounted; [ ! -e $S/greets ] || cat $S/greets',
    "scancel": """
if env | grep -qE '^(SCANCEL_|SLURM_CLUSTERS)'; then exit 0; fi
echo "$*" >> $S/cancelled; code=0
while [[ $1 = -* ]]; do shift; done
if [ -e $S/silent ]; then echo 'scancel: error: Kill job error: Socket timed out' >&2; exit 140; fi
for id in "$@"; do
    if [ "$(cat $S/denied 2> /dev/null)" = $id ]; then
        echo "scancel: error: Kill job error on job id $id: Access/permission denied" >&2; code=210
    elif [ ! -e $S/jobs/$id ]; then
        echo "scancel: error: Kill job error on job id $id: Invalid job id specified" >&2; code=1
    else echo 'CANCELLED|None||N/A' > $S/jobs/$id; fi
done
exit $code""",
}


class FakeSlurm:
    """The commands in `bin`, and what they know.

    Files that steer them: `refused`, `lost`, `slow` (number of an sbatch; a slow one makes `here` and waits for `go`),
    `reason` (of waiting jobs), `silent` (the controller does not answer), `denied` (a job that is somebody else's),
    `says` (what sbatch prints, with ID for the job's number), `warns` (on stderr), `greets` (what the others print
    first), `blind` (jobs that squeue leaves out).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        for name in ("bin", "jobs", "scripts", "options", "environment"):
            (folder / name).mkdir(parents=True)
        for name, text in SCRIPTS.items():
            path = self.bin / name
            path.write_text(f"#!/bin/bash\nS={folder}\n{text}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def path(self) -> str:
        """$PATH with these commands before all others."""
        return f"{self.bin}{os.pathsep}/usr/bin:/bin"

    def steer(self, **files: object) -> None:
        for name, value in files.items():
            (self.folder / name).write_text(f"{value}\n")

    def relent(self, name: str) -> None:
        (self.folder / name).unlink()

    def add(self, job_id: str, state: str, reason: str = "None", nodes: str = "") -> None:
        """A job that is in Slurm already, or its new state."""
        (self.folder / "jobs" / job_id).write_text(f"{state}|{reason}|{nodes}|N/A\n")

    def forget(self, job_id: str) -> None:
        (self.folder / "jobs" / job_id).unlink()

    def states(self) -> dict[str, str]:
        """Slurm's word for every job, by ID."""
        return {file.name: file.read_text().split("|")[0] for file in sorted((self.folder / "jobs").iterdir())}

    def said(self, name: str) -> str:
        """Text of `calls`, `cancelled` and the like; "" when there is none."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""
