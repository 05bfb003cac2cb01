"""The launch scripts: their dry runs, a local job of several processes, and SLURM's tasks."""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax._src.clusters.slurm_cluster import SlurmCluster

from mdt_jax.parallel.distributed import is_cluster

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "tools" / "launch"
TPU = [
    "--name",
    "slice",
    "--zone",
    "z",
    "--type",
    "v4-512",
    "--setup",
    "echo 'a b' && c",
]
GKE = ["--cluster", "c", "--zone", "z", "--workload", "w", "--image", "i", "--type", "v5litepod-16"]
COMMAND = ["python3", "-m", "mdt_jax.train", "--workdir", "/mnt/my runs/xl2"]


def launch(script, *arguments, timeout=60, **settings):
    """(status, standard output, standard error) of a launch script."""
    command = ["bash", LAUNCH / script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, **settings
    )
    return done.returncode, done.stdout, done.stderr


def dry_run(script, *arguments):
    """The words of each command line that a script would run."""
    status, out, err = launch(script, "--dry_run", *arguments)
    assert status == 0, err
    return [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]


# ---- Dry runs ----------------------------------------------------------------------------------


def test_the_local_job_says_who_is_who():
    lines = dry_run("local.sh", "--devices", 4, 2, "--", *COMMAND)
    assert [line[0] for line in lines] == ["JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1"]
    assert lines[0][1:] == lines[1][1:]
    assert re.fullmatch(r"JAX_COORDINATOR_ADDRESS=localhost:\d+", lines[0][1])
    assert "JAX_NUM_PROCESSES=2" in lines[0] and lines[0][-len(COMMAND) :] == COMMAND
    assert lines[0][4].endswith("--xla_force_host_platform_device_count=4")


def test_the_slurm_job_queues_itself_again_only_when_it_stopped_early():
    step, again = dry_run("slurm.sh", *COMMAND)
    assert step[0] == "srun" and step[-len(COMMAND) :] == COMMAND
    assert step[-len(COMMAND) - 1] == "tools/launch/until_done.sh"
    assert again == ["with", "status", "75:", "scontrol", "requeue", "JOB"]
    _, out, _ = launch("slurm.sh", "--dry_run", *COMMAND)
    assert "#SBATCH --signal=USR1@300\n#SBATCH --requeue\n" in out


def test_the_slurm_job_runs_in_a_container_that_sees_the_clone():
    image = {"CONTAINER_IMAGE": "/images/mdt jax.sqsh", "CONTAINER_MOUNTS": "/shared:/shared"}
    _, out, _ = launch("slurm.sh", "--dry_run", *COMMAND, env=os.environ | image)
    step = shlex.split(next(line for line in out.splitlines() if line.startswith("srun")))
    assert step[3:6] == [
        "--container-image=/images/mdt jax.sqsh",
        f"--container-mounts={ROOT}:{ROOT},/shared:/shared",
        f"--container-workdir={ROOT}",
    ]
    assert step[6:] == ["bash", "tools/launch/until_done.sh", *COMMAND]


def test_the_tpu_job_makes_the_slice_and_runs_on_all_its_hosts():
    create, delete, setup, clear, train = dry_run("tpu_pod.sh", *TPU, "--spot", "--", *COMMAND)
    assert create[3:6] == ["tpu-vm", "create", "slice"]
    assert {"--accelerator-type=v4-512", "--zone=z", "--spot"} <= set(create)
    assert delete[4:6] == ["delete", "slice"]
    for line in (setup, clear, train):
        assert line[4:8] == ["ssh", "slice", "--zone=z", "--worker=all"]
    assert setup[8] == "--command=echo 'a b' && c"
    assert "[m]dt_jax" in clear[8]
    assert shlex.split(train[8].partition("until_done.sh ")[2]) == COMMAND


def test_the_gke_job_is_restarted_when_it_stopped_early():
    (line,) = dry_run("gke_xpk.sh", *GKE, "--slices", 4, "--project", "p", "--", *COMMAND)
    assert line[:3] == ["xpk", "workload", "create"]
    assert {"--num-slices=4", "--project=p", "--restart-on-exit-codes=1,75"} <= set(line)
    assert shlex.split(line[-1].partition("until_done.sh ")[2]) == COMMAND


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("local.sh", ["two", "--", "true"]),
        ("local.sh", ["2"]),
        ("slurm.sh", []),
        ("tpu_pod.sh", [*TPU[:6], "--", "true"]),
        ("gke_xpk.sh", [*GKE, "--slice", "4", "--", "true"]),
        ("until_done.sh", []),
    ],
)
def test_a_wrong_call_runs_nothing_and_shows_how(script, arguments):
    status, out, err = launch(script, *arguments)
    assert status == 2 and out == "" and f"tools/launch/{script}" in err


def test_shellcheck_has_nothing_to_say():
    here = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{here}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, 'pip install -e ".[test]" brings it'
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) > 4
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_built_from_what_is_there_for_every_accelerator():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    given = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    copied = [word for line in given if line[0] == "COPY" for word in line[1:-1]]
    assert {"setup.cfg", "pyproject.toml", "mdt_jax"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert setup["metadata"]["long_description"].removeprefix("file: ") in copied
    assert ["FROM", "python:3.11-slim"] in given
    assert setup["options"]["python_requires"].startswith(">=3.11")
    # By CUDA's version, as JAX names its wheels.
    extras = setup["options.extras_require"]
    for name in ("tpu", "cuda12", "cuda13"):
        assert f"jax[{name}]>=0.10" in extras[name].split()
    built = re.findall(r"EXTRA=(\w+)", "\n".join(lines))
    assert {"tpu", "cuda13"} <= set(built) <= set(extras)


# ---- Run again or not --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        ("stopped at step 7, saved; the same command resumes", 0, 75),
        ("stopping before the first step: SIGTERM", 0, 75),
        ("done; to sample: python -m mdt_jax.sample", 0, 0),
        ("stopped at step 7, saved", 3, 3),
    ],
)
def test_a_run_that_stopped_early_is_to_be_run_again(said, status, expected):
    command = f"echo {shlex.quote(said)} >&2; exit {status}"
    found, _, err = launch("until_done.sh", "bash", "-c", command)
    assert found == expected and said in err
    assert ("run it again" in err) == (expected == 75)


def test_training_says_what_until_done_looks_for():
    files = ("train/loop.py", "parallel/preemption.py")
    training = "".join((ROOT / "mdt_jax" / f).read_text() for f in files)
    (pattern,) = re.findall(r"grep -qE '(.*)'", (LAUNCH / "until_done.sh").read_text())
    for words in pattern.split("|"):
        assert f'logging.info("{words}' in training


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_reaches_the_command_and_its_last_words_are_read(name):
    command = (
        f"trap 'echo stopped at step 1 >&2; exit 0' {name}; echo up; while sleep 0.1; do :; done"
    )
    process = subprocess.Popen(
        ["bash", LAUNCH / "until_done.sh", "bash", "-c", command], stdout=-1, stderr=-1, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert "stopped at step 1" in process.communicate(timeout=20)[1]
    assert process.returncode == 75


# It answers like gcloud: the slice is preempted during the first run, the second stops early.
GCLOUD = """#!/bin/bash
verb=$4
for last; do :; done
[[ $last == --command=pkill* ]] && verb=clear
[[ $last == --command=*until_done.sh* ]] && verb=train
echo $verb >> calls
case $verb in
  describe) cat state 2>/dev/null ;;
  create) echo READY > state ;;
  delete) rm state ;;
  train)
    case $(grep -c train calls) in
      1) echo PREEMPTED > state && exit 1 ;;
      2) echo 'python3: stopped before its end, saved; run it again (status 75)' >&2 && exit 1 ;;
    esac
    ;;
esac
exit 0
"""


def fake(folder, **commands):
    """Settings with which a script finds commands of those texts, and a `sleep` that returns."""
    for name, text in ({"sleep": "#!/bin/bash\n"} | commands).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_preempted_slice_is_made_again_and_a_stopped_run_gone_on_with(tmp_path):
    command = ["bash", LAUNCH / "tpu_pod.sh", *TPU, "--retries", "0", "--", *COMMAND]
    env = fake(tmp_path, gcloud=GCLOUD)
    subprocess.run(command, check=True, cwd=tmp_path, env=env, timeout=60, capture_output=True)
    calls = [call for call in (tmp_path / "calls").read_text().split() if call != "describe"]
    made = ["create", "ssh", "clear", "train"]
    assert calls == [*made, "delete", *made, "clear", "train"]


def test_a_command_that_fails_on_a_standing_slice_ends_the_loop(tmp_path):
    command = ["bash", LAUNCH / "tpu_pod.sh", *TPU, "--retries", "2", "--", *COMMAND]
    env = fake(tmp_path, gcloud=GCLOUD.replace("  train)", "  train) exit 3 ;;\n  never)"))
    done = subprocess.run(command, cwd=tmp_path, env=env, timeout=60, capture_output=True)
    assert done.returncode == 3
    assert (tmp_path / "calls").read_text().split().count("train") == 3


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_a_slurm_job_is_requeued_by_its_status(tmp_path, status, requeued):
    env = fake(
        tmp_path, srun=f"#!/bin/bash\nexit {status}\n", scontrol='#!/bin/bash\necho "$@" > asked\n'
    )
    command = ["bash", LAUNCH / "slurm.sh", *COMMAND]
    done = subprocess.run(command, cwd=tmp_path, env=env | {"SLURM_JOB_ID": "12"}, timeout=60)
    assert done.returncode == (0 if requeued else status)
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 12\n"


# ---- A job on this machine ---------------------------------------------------------------------

MEMBER = """
from mdt_jax.parallel.distributed import gather_json, initialize_distributed
initialize_distributed()
import jax
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
      gather_json("me", jax.process_index()))
"""


def test_a_local_job_is_one_job():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    arguments = ["--devices", 2, 2, "--", sys.executable, "-c", MEMBER]
    status, out, err = launch(
        "local.sh", *arguments, env=environment | {"PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert status == 0, err + out
    said = [line for line in out.splitlines() if line.endswith("[0, 1]")]
    assert sorted(said) == ["[0] 0 2 2 4 [0, 1]", "[1] 1 2 2 4 [0, 1]"]


def test_a_process_that_dies_takes_the_local_job_down():
    began = time.monotonic()
    command = "((JAX_PROCESS_ID)) && exec sleep 60; kill -KILL $$"
    status, _, err = launch("local.sh", "--grace", 1, 3, "--", "bash", "-c", command)
    assert status == 137 and "process 0 ended with status 137" in err
    assert time.monotonic() - began < 20


def test_a_local_job_passes_sigterm_on_and_waits():
    command = "trap 'echo saved; exit 0' TERM; echo up; while sleep 0.1; do :; done"
    process = subprocess.Popen(
        ["bash", LAUNCH / "local.sh", "2", "--", "bash", "-c", command], stdout=-1, text=True
    )
    assert {process.stdout.readline() for _ in range(2)} == {"[0] up\n", "[1] up\n"}
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=20)[0]
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"] and process.returncode == 0


# ---- SLURM -------------------------------------------------------------------------------------

TASK = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[03-04,07]",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
}


def test_a_slurm_task_is_told_from_its_variables(monkeypatch):
    """JAX's own code reads from the variables all that `jax.distributed.initialize` needs."""
    assert is_cluster(TASK)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present()
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (24, 17)
    assert SlurmCluster.get_local_process_id() == 1  # its one GPU of the node's
    assert SlurmCluster.get_coordinator_address(None, None) == "gpu03:61441"


def test_a_slurm_job_of_one_task_is_no_cluster():
    assert not is_cluster(TASK | {"SLURM_NTASKS": "1"})
