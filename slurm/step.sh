# The part of a job that every process runs, on its node and inside its container. Sourced by the step script that the
# launcher writes, after the variables of the job and the cluster file's environment are set.
#
# shellcheck shell=bash

# The early warning reaches every process of the step. Python puts its own handler in place; until then, ignoring it is
# better than dying of it.
trap '' USR1

export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$POSTNAS_NPROC"
export PYTHONPATH="$POSTNAS_CODE:$POSTNAS_CODE/kernels:$POSTNAS_CODE/launcher${PYTHONPATH:+:$PYTHONPATH}"
# The code that was shipped with the job counts, not what lies in the working directory.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
node="${SLURMD_NODENAME:-$(hostname -s)}"

if [ "${POSTNAS_STEP:-run}" = preflight ]; then
    exec "$POSTNAS_PYTHON" "$POSTNAS_CODE/slurm/preflight.py" "$node"
fi

cd "$POSTNAS_CWD" 2>/dev/null || cd "$POSTNAS_RUN_DIR" || exit 1
# One log per node and attempt, besides the job's own. The copying process outlives signals, so that the last lines of a
# process that is saving are not lost.
log="$POSTNAS_LOG_DIR/$POSTNAS_JOB.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$node.log"
exec > >(trap '' USR1 TERM INT HUP; exec tee -a "$log") 2>&1
exec "$POSTNAS_PYTHON" -m "$POSTNAS_WORKER" "$POSTNAS_RUN_DIR" "$POSTNAS_TARGET"
