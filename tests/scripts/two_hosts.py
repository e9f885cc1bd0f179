"""Train on two network namespaces, as on two hosts with one process each.

    python tests/scripts/two_hosts.py

The same command runs in both, joined by a virtual cable; the weights must be those of one process
with the same batch, to 1e-5. Linux only; where namespaces are not allowed the script says so.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.image_runs import PROGRAM, arguments, distance, weights

# Run inside a namespace of its own: host 1; makes host 2 and the cable between them.
HOSTS = """
set -e
unshare -n sleep 600 & other=$!
trap 'kill $other' EXIT
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ] && break
    sleep 0.1
done
ip link add cable1 type veth peer name cable2 netns $other
there="nsenter -t $other -n"
ip addr add 10.77.0.1/24 dev cable1
$there ip addr add 10.77.0.2/24 dev cable2
ip link set lo up; ip link set cable1 up
$there ip link set lo up; $there ip link set cable2 up
[ $# = 0 ] && exit
GLOO_SOCKET_IFNAME=cable2 $there "$@" --node-rank 1 "$PROGRAM" $RUN & second=$!
GLOO_SOCKET_IFNAME=cable1 "$@" --node-rank 0 "$PROGRAM" $RUN
wait $second
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", HOSTS, "sh"]


def main(folder: Path) -> bool:
    """Train on two hosts and on one; return whether the weights agree."""
    try:
        subprocess.run(NAMESPACE, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"network namespaces are not allowed here, nothing was tested: {reason}")
        return True
    python = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    python += ["--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", "29500"]
    run = {"RUN": " ".join(arguments(folder, "two")), "PROGRAM": str(PROGRAM)}
    subprocess.run([*NAMESPACE, *python], check=True, env=os.environ | run)
    subprocess.run([sys.executable, PROGRAM, *arguments(folder, "one")], check=True)
    far = distance(weights(folder / "one", 6), weights(folder / "two", 6))
    print(f"two hosts and one process: weights and averages differ by {far:.1e}")
    return far < 1e-5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(not main(Path(name)))
