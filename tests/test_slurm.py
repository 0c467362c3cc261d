"""scripts/multinode.slurm on SLURM clusters of two nodes that share this machine.

They need SLURM (Debian: `apt-get install --no-install-recommends slurm-wlm munge`), root, and the
scripts that start them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_world import REPO, TIMEOUT, read_log, read_rollouts, read_scalars, script

from opd_titan.checkpoint.steps import complete_steps

MULTINODE = REPO / "scripts" / "multinode.slurm"
STEPS = 12
OPTIONS = f"""
    --training.steps {STEPS} --training.deterministic true --rollout.prompts_per_step 8
    --metrics.sample_rollouts -1 --validation.enable false
""".split()
NETNS = "start_slurm_netns.sh"  # a network of its own for each node


def clean_environment(**environment: str) -> dict[str, str]:
    """Return this environment with this Python first and without SLURM's variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    for name in ("CONFIG_FILE", "NGPU", "CUDA_VISIBLE_DEVICES", "OPD_TITAN_ROOT"):
        env.pop(name, None)
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "PATH": path, **environment}


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    number: str
    console: Path
    env: dict[str, str]

    def command(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.env, check=True, capture_output=True, text=True
        ).stdout

    def state(self) -> dict[str, str]:
        shown = self.command("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not until():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.text()}"
            time.sleep(0.1)

    def wait_for_file(self, path: Path) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED")
        self.wait(lambda: path.exists() or self.state()["JobState"] in ended)
        assert path.exists(), self.text()

    def finish(self) -> tuple[str, str, str]:
        """Its state, exit code and number of restarts when it has ended."""
        going = ("PENDING", "RUNNING", "COMPLETING")
        self.wait(lambda: self.state()["JobState"] not in going)
        state = self.state()
        return state["JobState"], state["ExitCode"].split(":")[0], state["Restarts"]

    def text(self) -> str:
        return self.console.read_text() if self.console.exists() else ""


@dataclass(frozen=True)
class Cluster:
    """Two nodes."""

    conf: str

    def submit(self, folder: Path, *options: str, nodes: str = "-N2", **environment: str) -> Job:
        """Submit the default recipe from `folder`, which is not the repository's."""
        env = clean_environment(SLURM_CONF=self.conf, **environment)
        command = ["nice", "sbatch", "--parsable", *nodes.split(), str(MULTINODE), *options]
        number = subprocess.run(
            command, cwd=folder, env=env, check=True, capture_output=True, text=True
        ).stdout.strip()
        return Job(number, folder / f"opd_titan-{number}.out", env)


def rename_hosts() -> None:
    """Let the nodes' names mean the node itself to each node, as on a plain Debian machine."""
    hosts = Path("/etc/hosts")
    text = re.sub(
        r"^\S+ (node\d+ # slurm-sandbox)$", r"127.0.1.1 \1", hosts.read_text(), flags=re.M
    )
    hosts.write_text(text)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, shared_slurm: Path) -> Iterator[Cluster]:
    import torch

    missing = [b for b in ("sbatch", "slurmctld", "slurmd", "munged", "ip") if not shutil.which(b)]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and SLURM; {', '.join(missing) or 'root'} is missing here")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs: those of the test cluster are false ones")
    name = getattr(request, "param", "start_slurm.sh")
    root = Path(tempfile.mkdtemp(prefix="opd-titan-slurm-"))
    env = {**clean_environment(), "SLURM_ROOT": str(root)}
    # The clusters have fixed ports: another run of the tests on this machine waits.
    with (Path(tempfile.gettempdir()) / "opd-titan-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            subprocess.run(["bash", shared_slurm / name], env=env, check=True, timeout=60)
            if name == NETNS:
                rename_hosts()
            yield Cluster(f"{root}/etc/slurm.conf")
        finally:
            stop = shared_slurm / name.replace("start", "stop")
            subprocess.run(["bash", stop], env=env, check=True, timeout=60)


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the same job with torchrun, 4 processes on one machine."""
    out = tmp_path_factory.mktemp("torchrun") / "out"
    argv = ["--job.config_file", "", *OPTIONS, "--job.dump_folder", str(out)]
    run = script(argv, processes=4)
    _, err = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 0, err
    return out


def assert_same_numbers(a: Path, b: Path) -> None:
    """Assert the same tokens, and equal scalars up to rounding."""
    rollouts = [read_rollouts(out) for out in (a, b)]
    assert list(rollouts[0]) == list(rollouts[1]) == list(range(1, STEPS + 1))
    tokens = [
        [row["response_tokens"] for step in steps.values() for row in step] for steps in rollouts
    ]
    assert tokens[0] == tokens[1]
    scalars = [read_scalars(out, measured=False) for out in (a, b)]
    assert scalars[0].keys() == scalars[1].keys() and "kl/student_teacher" in scalars[0]
    for name, values in scalars[0].items():
        assert values == pytest.approx(scalars[1][name], rel=1e-4, abs=1e-6), name


# -------------------------------------------------------------------- cluster


@pytest.mark.long
@pytest.mark.parametrize("cluster", ["start_slurm.sh", NETNS], indirect=True)
def test_two_nodes_give_the_numbers_of_one_machine(
    cluster: Cluster, one_machine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    gpus = "-N2 --gpus-per-node=2"  # says how many processes; there are none
    job = cluster.submit(tmp_path, *OPTIONS, "--job.dump_folder", str(out), nodes=gpus)
    assert job.finish() == ("COMPLETED", "0", "0"), job.text()
    assert "2 nodes x 2 processes" in job.text()
    assert job.text().count("Done: ") == 1, "one rank speaks"
    # torch may log, with a C++ stack, that the node with the store left a moment before the other.
    for bad in ("Traceback", "failed with exit code", "srun: error"):
        assert bad not in job.text()
    assert sorted(p.name for p in (out / "logs").iterdir()) == [f"rank-{n}.log" for n in range(4)]
    assert_same_numbers(out, one_machine)


@pytest.mark.long
def test_near_the_time_limit_it_saves_and_the_requeued_job_goes_on(
    cluster: Cluster, one_machine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = cluster.submit(tmp_path, *OPTIONS, "--job.dump_folder", str(out), NGPU="2")
    job.wait_for_file(out / "rollouts" / "step-2.jsonl")
    # What SLURM sends before the limit, to the batch script only.
    job.command("scancel", "--signal=USR1", "--batch", job.number)
    job.wait(lambda: job.state()["Restarts"] == "1" and job.state()["JobState"] == "PENDING")
    (stopped_at,) = complete_steps(out / "checkpoint")
    assert 2 <= stopped_at < STEPS
    for rank in range(4):
        assert f"Stopped by signal 10 after step {stopped_at}" in read_log(out, rank)
    assert f"job {job.number} goes back into the queue" in job.text()
    # SLURM waits two minutes. Less is enough, but to the nodes the job was killed a moment ago.
    time.sleep(5)
    job.command("scontrol", "update", f"jobid={job.number}", "StartTime=now")
    assert job.finish() == ("COMPLETED", "0", "1"), job.text()
    assert f"next step {stopped_at + 1}" in read_log(out)
    assert "start 1: " in job.text() and "start 2: " in job.text(), "the console is appended to"
    assert_same_numbers(out, one_machine)


@pytest.mark.long
def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [*OPTIONS, "--training.steps", "500", "--job.dump_folder", str(out)]
    job = cluster.submit(tmp_path, *options, nodes="-N1")
    job.wait_for_file(out / "rollouts" / "step-2.jsonl")
    job.command("scancel", job.number)
    state, _, restarts = job.finish()
    assert (state, restarts) == ("CANCELLED", "0")
    assert "1 nodes x 1 processes" in job.text()
    (stopped_at,) = complete_steps(out / "checkpoint")
    assert f"Stopped by signal 15 after step {stopped_at}" in read_log(out)


@pytest.mark.long
def test_stopped_before_any_checkpoint_it_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """Otherwise a job with a time limit that is too short is requeued without end."""
    out = tmp_path / "out"
    job = cluster.submit(tmp_path, *OPTIONS, "--job.dump_folder", str(out), nodes="-N1")
    job.wait(lambda: "start 1: " in job.text())
    job.command("scancel", "--signal=USR1", "--batch", job.number)
    state, code, restarts = job.finish()
    assert (state, restarts) == ("FAILED", "0") and code in ("75", "138"), job.text()
    assert "stopped before it had a new checkpoint" in job.text()


# (options of sbatch, environment, arguments, what is said; the last line if more)
MISTAKES = [
    ("-N2", {}, ["--optimizer.lrr", "1"], "--optimizer.lrr: unknown option"),
    ("-N2", {"NGPU": "two"}, [], "NGPU is 'two'"),
    ("-N2 --gpus=3", {}, [], "different numbers of GPUs (node1 2, node2 1)"),
    ("-N2", {}, ["--student.hf_path", "/nowhere/at"], "student.hf_path = '/nowhere/at'"),
]


@pytest.mark.long
@pytest.mark.parametrize(("nodes", "environment", "options", "told"), MISTAKES)
def test_a_mistake_is_one_line_and_is_not_requeued(
    cluster: Cluster,
    tmp_path: Path,
    nodes: str,
    environment: dict[str, str],
    options: list[str],
    told: str,
) -> None:
    job = cluster.submit(tmp_path, *options, nodes=nodes, **environment)
    assert job.finish() == ("FAILED", "2", "0")
    lines = [line for line in job.text().splitlines() if " start 1: " not in line]
    assert len(lines) == 1 and told in lines[0], job.text()


# ---------------------------------------------------------------- no cluster


def run_copy(folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a copy of the script, which is what sbatch runs."""
    copy = shutil.copy(MULTINODE, folder / "slurm_script")
    env = clean_environment(SLURM_CONF="/dev/null", **environment)
    done = subprocess.run(
        ["bash", copy], cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_without_slurm_it_says_how_to_start_it(tmp_path: Path) -> None:
    code, err = run_copy(tmp_path)
    (line,) = err.splitlines()
    assert code == 2 and "sbatch" in line


@pytest.mark.parametrize("name", ["SLURM_SUBMIT_DIR", "OPD_TITAN_ROOT"])
def test_a_repository_that_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    code, err = run_copy(tmp_path, SLURM_JOB_ID="1", **{name: str(tmp_path / "elsewhere")})
    (line,) = err.splitlines()
    assert code == 2
    assert str(tmp_path / "elsewhere") in line and "set OPD_TITAN_ROOT" in line


def test_the_batch_script_names_no_size_of_the_allocation() -> None:
    asked = re.findall(r"^#SBATCH --([a-z-]+)", MULTINODE.read_text(), flags=re.M)
    assert asked == ["job-name", "output", "open-mode", "requeue", "signal"]
