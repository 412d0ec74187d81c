# Asking Slurm from inside a job. Sourced by job.sh.
#
# Answers of Slurm's commands are searched for what fits, never taken whole: sites wrap them in scripts that print.
#
# shellcheck shell=bash disable=SC2154

postnas_states='PENDING|RUNNING|SUSPENDED|STOPPED|COMPLETING|CONFIGURING|COMPLETED|CANCELLED|FAILED|TIMEOUT|NODE_FAIL'
postnas_states+='|PREEMPTED|BOOT_FAIL|DEADLINE|OUT_OF_MEMORY|REQUEUED|REQUEUE_HOLD|REQUEUE_FED|RESV_DEL_HOLD|REVOKED'
postnas_states+='|SPECIAL_EXIT|SIGNALING|STAGE_OUT|RESIZING'

# A user's own filters and formats (SQUEUE_PARTITION, SLURM_CLUSTERS) must not change what is asked here. Modules and set-up
# lines may bring them again.
postnas_forget_filters() {
    unset "${!SQUEUE_@}" "${!SACCT_@}" "${!SCANCEL_@}" "${!SCONTROL_@}" "${!SBATCH_@}" SLURM_CLUSTERS SLURM_TIME_FORMAT
}

# What a command printed without colours for a terminal and without carriage returns.
postnas_plain() { LC_ALL=C sed -e $'s/\e\\[[0-9;?]*[@-~]//g' -e $'s/\e[()][A-Za-z0-9]//g' -e $'s/\r$//'; }

# A field of this job as scontrol shows it, if its value fits the pattern.
postnas_job_field() {
    scontrol show job --oneliner "$SLURM_JOB_ID" 2> /dev/null | postnas_plain |
        sed -n "s/^\(JobId=$SLURM_JOB_ID .*\)$/\1/p" | grep -oE " $1=$2( |\$)" | head -n 1 | sed 's/^[^=]*=//; s/ $//'
}

# This job's state, `gone` where Slurm has forgotten it, nothing where it does not answer. Silence and words that are no
# state are no word about the job: scontrol is asked then, too.
postnas_state() {
    local said word
    said=$(squeue --noheader --states=all --jobs="$SLURM_JOB_ID" --format=%T 2>&1 | postnas_plain)
    word=$(grep -oE "^($postnas_states)[[:space:]]*\$" <<< "$said" | head -n 1 | tr -d '[:space:]')
    [ -n "$word" ] || word=$(postnas_job_field JobState '[A-Z_]+')
    [ -n "$word" ] || [[ $said != *"Invalid job id"* ]] || word=gone
    echo "$word"
}

# Only a job that Slurm regards as running may queue itself again: anything else would bring a cancelled job back. A
# controller that is away is waited for until shortly before the time limit: the nodes are paid for anyway.
postnas_requeue() {
    local state pause=1 refused=0 until=${postnas_end:-$(($(date +%s) + 600))}
    while :; do
        state=$(postnas_state)
        if [ "$state" = RUNNING ]; then
            # Slurm answers with SIGTERM for this whole script, so the command has to ignore it.
            (trap '' TERM; scontrol requeue "$SLURM_JOB_ID") && return 0
            refused=$((refused + 1))
            [ "$refused" -lt 5 ] || { postnas_say "Slurm refuses to queue it again"; return 1; }
        elif [ -n "$state" ]; then
            postnas_say "Slurm is ending this job ($state); it is not queued again from here"
            return 1
        elif [ "$(($(date +%s) + pause))" -ge $((until - postnas_guard_seconds)) ]; then
            postnas_say "Slurm does not answer and the time limit is near; it is not queued again from here"
            return 1
        fi
        [ "$pause" -gt 1 ] || [ -n "$state" ] || postnas_say "Slurm does not answer; waiting for it"
        sleep "$pause"
        pause=$((pause < 30 ? 2 * pause : 30))
    done
}

# The head node's address as Slurm knows it; `hostname -i` may name an interface that other nodes cannot reach.
postnas_head_address() {
    scontrol show node --oneliner "$1" | postnas_plain | grep -oE ' NodeAddr=[A-Za-z0-9_.:%-]+( |$)' | head -n 1 | sed 's/.*=//; s/ $//'
}

# The nodes of this job, one a line.
postnas_nodes() {
    local name
    scontrol show hostnames "$SLURM_JOB_NODELIST" | postnas_plain | grep -xE '[A-Za-z0-9_][A-Za-z0-9_.-]*' | while read -r name; do
        [[ $SLURM_JOB_NODELIST != *"${name%%[0-9]*}"* ]] || echo "$name"
    done | tail -n "$SLURM_JOB_NUM_NODES"
}

# Below the range that the kernel hands out, one per job, and not in use by somebody else on the head node.
postnas_port() {
    local port=$((15000 + SLURM_JOB_ID % 15000))
    for _ in $(seq 50); do
        (exec 3<> "/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
        port=$((15000 + (port - 15000 + 97) % 15000))
    done
    echo "$port"
}
