# The part of a job that runs once, in the batch script on the head node. Sourced, never executed: by the script that
# NeMo-Run submits and by postnas.sbatch. The launcher has set POSTNAS_* before, and calls in turn postnas_enter, what loads
# modules, the cluster file's set-up lines, and postnas_begin (launcher/jet_launcher/slurm/scripts.py). postnas_srun holds
# the options of every step, postnas_sbatch those of the job.
#
# A job ends in one of four ways, and the exit trap below decides what follows:
#   0     the stage has its result; Slurm starts its dependents
#   75    interrupted and saved: queue again
#   other crashed: queue again, unless it crashed POSTNAS_RESTARTS times in a row without getting further
#   -     Slurm ends it itself (scancel, preemption, node failure, scontrol requeue): Slurm decides, this script only notes it
#
# shellcheck shell=bash disable=SC2154

# shellcheck source=slurm/ask.sh
source "$POSTNAS_CODE/slurm/ask.sh"
# shellcheck source=slurm/preflight.sh
source "$POSTNAS_CODE/slurm/preflight.sh"

postnas_attempts="$POSTNAS_RUN_DIR/cluster/attempts/$POSTNAS_JOB.log"
postnas_idle_limit=10   # interruptions in a row without progress: time limit shorter than start-up, endless preemption
postnas_guard_seconds=20
postnas_guard_look=5
postnas_guard=
postnas_phase=start
postnas_terminated=       # 1 once Slurm has sent SIGTERM to this script
postnas_end=              # the time limit, Unix seconds; empty where Slurm does not say
postnas_restart=${SLURM_RESTART_COUNT:-0}

postnas_say() { echo "postnas: $(date '+%F %T') $POSTNAS_JOB (job $SLURM_JOB_ID, restart $postnas_restart): $*"; }

# Names of what is on disk for good: checkpoints and results. Two starts that see the same names got nowhere in between.
postnas_progress() {
    { find "$POSTNAS_STATE_DIR" -maxdepth 6 -name '.*' -prune -o \( -path '*/checkpoints/*' -o -name '*.json' \) \
        ! -name status.json ! -name inputs.json -printf '%P\n' 2>/dev/null || true; } | LC_ALL=C sort | cksum | tr ' ' -
}

# One line per event: time, event, job, restart, progress, and for `start` nodes, for others exit code and reason.
# Fails when it cannot be written, at the second try; without it nobody would count the restarts.
postnas_note() {
    local line try
    line="$(date +%s) $1 $SLURM_JOB_ID $postnas_restart $(postnas_progress) ${*:2}"
    for try in 1 2; do
        { mkdir -p "${postnas_attempts%/*}" && echo "$line" >> "$postnas_attempts"; } && return 0
        [ "$try" = 2 ] || sleep 2
    done
    return 1
}

# Whether another attempt has begun since: Slurm took this one for dead. Then nothing here counts any more, and to queue
# the job again would end that attempt. configs/attempts.py asks the same in the workers.
postnas_superseded() {
    awk -v job="$SLURM_JOB_ID" -v restart="$postnas_restart" '
        $2 == "start" { last = $3 == job && $4 == restart; own = own || last }
        END { exit !(own && !last) }' "$postnas_attempts" 2> /dev/null
}

# Prints three counts since this job last got further: crashes, interruptions, failed preflights.
postnas_stalls() {
    awk -v job="$SLURM_JOB_ID" '
        $3 != job { next }
        !($5 in seen) { crashed = idle = preflight = 0; new = 1; seen[$5] = 1 }
        $2 == "start" { if (open && !new) idle++; open = 1 }
        $2 == "end" { if (!new) { if ($6 == 75) idle++; else crashed++ }; open = 0 }
        $2 == "preflight" { preflight++; open = 0 }
        { new = 0 }
        END { print crashed + 0, idle + 0, preflight + 0 }' "$postnas_attempts"
}

# Exit code 0 is not enough: srun returns it, too, when it loses a node.
postnas_has_result() {
    local try
    for try in 1 2 3; do   # a network file system may show it a little later
        [ ! -s "$POSTNAS_STATE_DIR/result.json" ] || return 0
        [ ! -s "$POSTNAS_RUN_DIR/stages/${POSTNAS_TARGET%%:*}/result.json" ] || return 0
        [ "$try" = 3 ] || sleep 1
    done
    return 1
}

# " (no space left in RUN_DIR)", or why else nothing can be written there; nothing where it can.
postnas_disk() {
    local said free probe="$POSTNAS_RUN_DIR/.space.$SLURM_JOB_ID"
    free=$(df -P "$POSTNAS_RUN_DIR" 2> /dev/null | awk 'NR > 1 { sub(/%/, "", $5); print 100 - $5 }')
    said=$(LC_ALL=C dd if=/dev/zero of="$probe" bs=65536 count=16 2>&1) && said=
    rm -f "$probe"
    case $said in
        '') [ "${free:-100}" -ge 1 ] || echo " (less than 1% of the disk left in $POSTNAS_RUN_DIR)" ;;
        *"No space left"*) echo " (no space left in $POSTNAS_RUN_DIR)" ;;
        *"quota"*) echo " (disk quota exceeded in $POSTNAS_RUN_DIR)" ;;
        *) echo " (cannot write in $POSTNAS_RUN_DIR: $(sed -n '1s/.*: //p' <<< "$said"))" ;;
    esac
}

# What this attempt has come to.
postnas_place() {
    if compgen -G "$POSTNAS_LOG_DIR/$POSTNAS_JOB.$SLURM_JOB_ID.$postnas_restart.*" > /dev/null; then echo "the stage"
    elif [ -d "$POSTNAS_RUN_DIR/cluster/preflight/$SLURM_JOB_ID.$postnas_restart" ]; then echo preflight
    else echo "set-up (modules, setup)"; fi
}

postnas_finish() {
    local code=$1 words state crashed idle
    # SIGTERM is not enough: a shell that gets it just before it waits in `read` looks at it when the read is over only.
    [ -n "$postnas_guard" ] && kill -KILL "$postnas_guard" 2>/dev/null
    [ "$postnas_phase" != over ] || exit "$code"   # preflight noted its own end
    if postnas_superseded; then
        postnas_say "another attempt has taken over; this one leaves with exit code $code"
        exit "$code"
    fi
    if [ "$code" = 0 ] && postnas_has_result; then
        postnas_note end 0 "done"
        postnas_say "done"
        exit 0
    fi
    words="crashed with exit code $code"
    if [ "$postnas_phase" = start ]; then words="set-up left with exit code $code"; fi
    if [ "$code" = 0 ]; then
        code=1 words="ended without an error and without a result"
    elif [ "$code" = 75 ]; then
        words="interrupted, saved"
    fi
    if [ "$code" != 75 ] && [ "$code" != 2 ]; then
        state=$(postnas_state)
        if [ -n "$postnas_terminated" ] || [[ $state != @(RUNNING|) ]]; then   # its own exit code says nothing then
            words="ended by Slurm in $(postnas_place) (exit code $code)"
            postnas_note end 75 "$words" || postnas_give_up "$code" "cannot write $postnas_attempts$(postnas_disk)"
            postnas_again "$code"
        fi
        words+=$(postnas_disk)
    fi
    postnas_note end "$code" "$words" || postnas_give_up "$code" "cannot write $postnas_attempts$(postnas_disk)"
    read -r crashed idle _ < <(postnas_stalls)
    if [ "$code" = 2 ]; then
        postnas_give_up "$code" "usage error"
    elif [ "$crashed" -gt "$POSTNAS_RESTARTS" ]; then
        postnas_give_up "$code" "$words, $crashed times without progress"
    fi
    postnas_again "$code"
}

# Queue this job again after its end was noted, and leave, unless interruptions do not end.
postnas_again() {
    local idle
    read -r _ idle _ < <(postnas_stalls)
    if [ "$idle" -gt "$postnas_idle_limit" ]; then postnas_give_up 1 "$(postnas_no_end "$idle")"; fi
    postnas_say "exit code $1; queueing again"
    postnas_requeue || postnas_say "not queued again"
    postnas_phase=over
    exit "$1"
}

postnas_no_end() {
    local last
    last=$(awk -v job="$SLURM_JOB_ID" '$3 == job && ($2 == "end" || $2 == "limit") { $1 = $2 = $3 = $4 = $5 = $6 = ""; print }' \
        "$postnas_attempts" | tail -n 1 | sed 's/^ *//')
    echo "interrupted $1 times without progress${last:+, last: $last}"
}

postnas_give_up() {
    postnas_note failed "$1" "$2"
    postnas_say "giving up: $2"
    postnas_phase=over
    exit "$1"
}

postnas_guard_acts() {
    local where
    if postnas_superseded; then return; fi
    where=$(postnas_place)
    postnas_say "the time limit is $postnas_guard_seconds seconds away, in $where; queueing again"
    # The script itself may get no time for a word.
    postnas_note limit 75 "the time limit came in $where"
    postnas_guard_seconds=2
    postnas_requeue
}

# Reaching the time limit would end the job for good. Early warning comes well before; this is for workers that missed it.
postnas_watch_clock() {
    local end left parent
    end=$(date -d "$(postnas_job_field EndTime '[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}')" +%s 2> /dev/null) &&
        [ "$end" -gt "$(date +%s)" ] || end=${SLURM_JOB_END_TIME:-}
    [ -n "$end" ] || return 0
    postnas_end=$end
    left=$((end - $(date +%s) - postnas_guard_seconds))
    [ "$left" -gt 0 ] || return 0
    (
        # A read that never gets anything sleeps without a process that could be left behind. Nothing ends a guard whose
        # script was killed, so it looks itself, and never queues a job again that goes on without that script.
        exec {never}<> <(:)
        end=$(($(date +%s) + left))
        while read -r _ _ _ parent _ < "/proc/$BASHPID/stat" && [ "$parent" = $$ ]; do
            left=$((end - $(printf '%(%s)T' -1)))
            [ "$left" -gt 0 ] || { postnas_guard_acts; break; }
            read -r -t $((left < postnas_guard_look ? left : postnas_guard_look)) -u "$never"
        done
    ) &
    postnas_guard=$!
    disown "$postnas_guard"   # whoever kills it later gets no line about that
}

# `module` is a function of login shells; batch scripts often have to fetch it.
postnas_load_module() {
    local file
    if ! type module > /dev/null 2>&1; then
        for file in /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh /etc/profile.d/modules.sh; do
            # shellcheck disable=SC1090
            [ -r "$file" ] && source "$file"
        done
    fi
    module load "$1" || postnas_give_up 1 "module load $1 failed on $(hostname -s)"
}

# Before modules and set-up lines, which may hang or end in the middle.
postnas_enter() {
    local idle
    postnas_forget_filters
    # Without a trap the shell dies at once and nobody decides what follows.
    trap 'postnas_terminated=1; postnas_say "SIGTERM"' TERM
    trap 'postnas_finish $?' EXIT
    postnas_note start "$SLURM_JOB_NUM_NODES $SLURM_JOB_NODELIST" ||
        postnas_give_up 1 "cannot write $postnas_attempts$(postnas_disk)"
    postnas_say "$POSTNAS_TARGET on $SLURM_JOB_NODELIST"
    read -r _ idle _ < <(postnas_stalls)
    if [ "$idle" -gt "$postnas_idle_limit" ]; then postnas_give_up 1 "$(postnas_no_end "$idle")"; fi
    postnas_watch_clock
}

postnas_begin() {
    set +eu +o pipefail
    postnas_forget_filters
    # Set-up lines are the user's: they may have traps of their own.
    trap 'postnas_terminated=1; postnas_say "SIGTERM"' TERM
    trap 'postnas_finish $?' EXIT
    # sbatch's own --cpus-per-task reaches steps through this variable only (since Slurm 22.05).
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
    export SLURM_EXPORT_ENV=ALL
    MASTER_ADDR=$(postnas_head_address "$(postnas_nodes | head -n 1)")
    MASTER_PORT=$(postnas_port)
    export MASTER_ADDR MASTER_PORT
    mkdir -p "$POSTNAS_STATE_DIR" "$POSTNAS_LOG_DIR"
    # A step that starts now would be the one that fails.
    if [ -n "$postnas_terminated" ]; then exit 143; fi
    if [ "$POSTNAS_PREFLIGHT" = 1 ]; then postnas_phase=preflight; postnas_preflight; fi
    postnas_phase=run
}
