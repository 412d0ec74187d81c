# Preflight from the batch script: runs slurm/preflight.py on every node and decides what follows. Sourced by job.sh.
#
# shellcheck shell=bash disable=SC2154,SC2034

# Why a node that wrote nothing is bad: the step's time ran out (124), or its process has ended by itself.
postnas_silence() {
    if [ "$1" = 124 ]; then echo "no answer within $POSTNAS_PREFLIGHT_TIMEOUT seconds"; return; fi
    echo "left with exit code $1: $(sed '/^ *$/d' "$POSTNAS_PREFLIGHT_DIR/log.txt" 2>/dev/null | tail -n 1 | cut -c 1-200)"
}

# Sets POSTNAS_BAD_NODES, those to exclude, and POSTNAS_BAD_REASON, from what nodes wrote and the exit code of the step.
# What all nodes have in common is no node's fault, and excluding them one by one would leave none.
postnas_judge_nodes() {
    local node bad=0 silent=0 reason first=
    POSTNAS_BAD_NODES='' POSTNAS_BAD_REASON=''
    for node in $(postnas_nodes); do
        if [ -e "$POSTNAS_PREFLIGHT_DIR/$node.ok" ] && [ ! -e "$POSTNAS_PREFLIGHT_DIR/$node.bad" ]; then continue; fi
        if [ -s "$POSTNAS_PREFLIGHT_DIR/$node.bad" ]; then
            reason=$(head -n 1 "$POSTNAS_PREFLIGHT_DIR/$node.bad")
        else
            reason=$(postnas_silence "$1")
            silent=$((silent + 1))
        fi
        bad=$((bad + 1))
        : "${first:="$node: $reason"}"
        POSTNAS_BAD_NODES=${POSTNAS_BAD_NODES:+$POSTNAS_BAD_NODES,}$node
        POSTNAS_BAD_REASON=${POSTNAS_BAD_REASON:+$POSTNAS_BAD_REASON; }"$node: $reason"
    done
    if [ "$bad" = 0 ]; then
        [ "$1" = 0 ] || POSTNAS_BAD_REASON="no single node to blame: exit code $1, see $POSTNAS_PREFLIGHT_DIR/log.txt"
    elif [ "$bad" = "$SLURM_JOB_NUM_NODES" ] && [ "$bad" -gt 1 ]; then
        POSTNAS_BAD_NODES='' POSTNAS_BAD_REASON="no single node to blame, all $bad are bad; $first"
    elif [ "$silent" = "$SLURM_JOB_NUM_NODES" ] && [[ $1 = 12[67] ]]; then
        # A command that is not there or cannot be run: a wrong path more likely than a bad node.
        POSTNAS_BAD_NODES='' POSTNAS_BAD_REASON="no single node to blame, $first"
    fi
}

# Whether this job could start anywhere without these nodes. Yes where Slurm does not say: some sites refuse sbatch here.
postnas_can_do_without() {
    local said
    said=$(sbatch --test-only "${postnas_sbatch[@]}" --exclude="$1" --wrap=true 2>&1) && return 0
    [[ $said != *"node configuration is not available"* ]]
}

postnas_preflight() {
    local failed state excluded again began=$SECONDS step=$((POSTNAS_PREFLIGHT_TIMEOUT + 60))
    export POSTNAS_PREFLIGHT_DIR="$POSTNAS_RUN_DIR/cluster/preflight/$SLURM_JOB_ID.$postnas_restart"
    mkdir -p "$POSTNAS_PREFLIGHT_DIR"
    POSTNAS_STEP=preflight timeout --signal=TERM --kill-after=15 "$step" \
        srun --output="$POSTNAS_PREFLIGHT_DIR/log.txt" "${postnas_srun[@]}" --wait=0 \
        bash "$POSTNAS_STEP_SCRIPT"
    failed=$?
    [ "$failed" = 0 ] || [ $((SECONDS - began)) -lt "$step" ] || failed=124
    if [ -s "$POSTNAS_PREFLIGHT_DIR/all.unfit" ]; then   # another node would not help
        postnas_note preflight 2 "$(head -n 1 "$POSTNAS_PREFLIGHT_DIR/all.unfit")"
        postnas_give_up 2 "preflight: $(head -n 1 "$POSTNAS_PREFLIGHT_DIR/all.unfit")"
    fi
    postnas_judge_nodes "$failed"
    if [ -z "$POSTNAS_BAD_REASON" ]; then return 0; fi
    # A job that is preempted or reaches its limit counts as running until its processes are gone. Its nodes are well.
    state=$(postnas_state)
    if [ -n "$postnas_terminated" ] || [[ $state != @(RUNNING|) ]] || { [[ $failed = @(143|137) ]] &&
        ! compgen -G "$POSTNAS_PREFLIGHT_DIR/*.bad" > /dev/null; }; then
        postnas_note end 75 "ended by Slurm in preflight (exit code $failed)"
        postnas_again 75
    fi
    postnas_note preflight "$failed" "$POSTNAS_BAD_REASON"
    read -r _ _ again < <(postnas_stalls)
    if [ "$again" -gt "$POSTNAS_PREFLIGHT_REQUEUES" ]; then
        postnas_give_up 1 "preflight failed $again times, now: $POSTNAS_BAD_REASON"
    fi
    if [ -n "$POSTNAS_BAD_NODES" ]; then
        excluded=$(postnas_job_field ExcNodeList '[]A-Za-z0-9_.,[-]+')
        excluded=${excluded:+$excluded,}$POSTNAS_BAD_NODES
        postnas_can_do_without "$excluded" ||
            postnas_give_up 1 "preflight failed: $POSTNAS_BAD_REASON; the other nodes are too few for this job"
    fi
    postnas_say "preflight failed: $POSTNAS_BAD_REASON; queueing again without ${POSTNAS_BAD_NODES:-excluding a node}"
    (
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID" && [ -n "$POSTNAS_BAD_NODES" ] &&
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
    )
    postnas_phase=over
    exit 75
}
