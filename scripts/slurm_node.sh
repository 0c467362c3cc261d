# The part of scripts/multinode.slurm that runs on each node. It uses the variables exported there.
#
#   slurm_node.sh count      print the name of this node and its number of GPUs
#   slurm_node.sh run ...    run the processes of this node with these arguments of the program
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "$1" = count ]; then
    # If SLURM does not manage the GPUs, count the visible ones.
    count="import os; from opd_titan.cli.start import visible_gpus; print(visible_gpus(os.environ))"
    echo "${SLURMD_NODENAME:-$(hostname)} ${SLURM_GPUS_ON_NODE:-$("$PYTHON" -c "$count")}"
    exit
fi
shift

# gloo uses the interface that the name of this host resolves to. On a host with several addresses the
# other nodes may not reach that one. Choose the interface of the route to another node.
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
# A requeued job resumes from its newest checkpoint, even if its first start used an older one.
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --checkpoint.load_step -1
# The static rendezvous is on the first node of SLURM. c10d would compare its address with those of
# each host, and hang if no host has it; it also orders ranks by host name.
exec "$PYTHON" -m opd_titan.cli.launch --nnodes "$NNODES" --nproc-per-node "$NGPU" \
    --rdzv-backend static --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --node-rank "$SLURM_NODEID" --master-addr "$RENDEZVOUS_HOST" --master-port "$RENDEZVOUS_PORT" \
    -m opd_titan.train --job.config_file "$CONFIG_FILE" "$@"
