# One node's part in scripts/multinode.slurm, which starts it on each node and says what is exported.
#
#   slurm_node.sh count      this node's name and its GPUs
#   slurm_node.sh run ...    this node's share of the processes, with the program's arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "$1" = count ]; then
    # Where SLURM does not manage the GPUs, what is visible counts.
    echo "${SLURMD_NODENAME:-$(hostname)} ${SLURM_GPUS_ON_NODE:-$(visible_gpus)}"
    exit
fi
shift

# gloo takes the interface that this host's own name resolves to: on a host with several addresses
# maybe none that the others reach. The one to take is the one that leads to another node.
choose_interface() {
    local peer="$RENDEZVOUS_HOST" route
    [ "$SLURM_NODEID" != 0 ] || peer="$NEIGHBOUR"
    peer=$(getent ahosts "$peer" | awk 'NR == 1 { print $1 }')
    route=$(ip -o route get "$peer")
    [[ "$route" =~ \ dev\ ([^ ]+) ]] || return 0
    [ "${BASH_REMATCH[1]}" = lo ] || export GLOO_SOCKET_IFNAME="${BASH_REMATCH[1]}"
}
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ "$NNODES" -gt 1 ] && command -v ip >/dev/null; then
    choose_interface
fi
set_worker_environment
# A job that was requeued goes on from its newest checkpoint, wherever it was first sent back to.
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --checkpoint.load_step -1
# The static rendezvous: who hosts it follows from SLURM's node number. c10d compares its address
# with those of the host and waits in vain where none is its own; it also orders ranks by name.
exec "$PYTHON" -m opd_titan.cli.launch --nnodes "$NNODES" --nproc-per-node "$NGPU" \
    --rdzv-backend static --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --node-rank "$SLURM_NODEID" --master-addr "$RENDEZVOUS_HOST" --master-port "$RENDEZVOUS_PORT" \
    -m opd_titan.train --job.config_file "$CONFIG_FILE" "$@"
