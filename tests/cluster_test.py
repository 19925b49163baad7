"""The scripts of launch/cluster, with what they call faked: no scheduler, no cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.helpers import sweeps
from tests.helpers.commands import LONGEST, ROOT, finish, free_port

SCRIPTS = [*ROOT.glob("launch/**/*.sh"), ROOT / ".ci" / "run"]
MANIFESTS = sorted(ROOT.glob("launch/cluster/*.yaml"))
SLURM, TPU = (ROOT / "launch" / "cluster" / name for name in ("slurm.sh", "tpu.sh"))
JOB = "4711"
ARGUMENTS = ['--prompt=It\'s a "test" of $HOME; and `more`', "--workdir", "runs/a b", ""]
PROGRAMS = ROOT / "tests" / "programs" / "cluster"


def script(path, program):
    """Make a program of `tests/programs/cluster` one that is run by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{(PROGRAMS / program).with_suffix('.py').read_text()}")
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """A directory that the scripts take for the repository, with a stand-in for its Python."""
    root = tmp_path / "repository"
    script(root / ".venv" / "bin" / "python", "command")
    for name in ("launch", "hydra_jax", "configs", "requirements.txt"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "requirements.txt", root / ".venv" / "installed-requirements.txt")
    for name in ("srun", "scancel", "scontrol", "gcloud"):
        script(tmp_path / "fakes" / name, name)
    return root


def start(repository, path, *arguments, **variables):
    fakes = repository.parent / "fakes"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_LOCAL"))}
    kept["TMPDIR"] = str(fakes)  # another run of the tests on this machine has its own
    return subprocess.Popen(
        ["bash", str(path), *arguments],
        cwd=repository,
        env=kept | {"PATH": f"{fakes}:{os.environ['PATH']}", "FAKES": str(fakes), "TASKS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slurm(repository, endings, *arguments, **variables):
    variables = dict(SLURM_JOB_ID=JOB, TASKS="2", ENDINGS=endings) | variables
    return start(repository, SLURM, *arguments or ["--workdir=run"], **variables)


def requeued(repository):
    path = repository.parent / "fakes" / "asked"
    return path.read_text() if path.exists() else None


def called(repository, number):
    return json.loads((repository.parent / "fakes" / f"called-{number}").read_text())


def wait_until_called(repository, count):
    deadline = time.monotonic() + LONGEST
    while not all((repository.parent / "fakes" / f"called-{number}").exists() for number in range(count)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable)) or "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", "--severity=warning", path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_clean(path):
    rules = "{extends: default, rules: {document-start: disable, comments: {min-spaces-from-content: 1},"
    rules += " line-length: {max: 120}}}"
    done = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-d", rules, path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_kubernetes_job_starts_processes_that_find_each_other():
    (volume,) = yaml.safe_load_all((ROOT / "launch/cluster/volume.yaml").read_text())
    service, job = yaml.safe_load_all((ROOT / "launch/cluster/kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = dict(argument.split("=", 1) for argument in container["args"])
    name = job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(arguments["--processes"])
    assert arguments["--process"] == "$(JOB_COMPLETION_INDEX)"
    assert arguments["--coordinator"].rpartition(":")[0] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy and backoffLimitPerIndex need it
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] == "Ignore"
        assert rule.get("onExitCodes", {}).get("containerName") in (None, container["name"])
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert claims == {"shared": volume["metadata"]["name"]}
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert set(mounts) == {each["name"] for each in pod["volumes"]}
    for path in (arguments["--workdir"], container["env"][0]["value"]):
        assert path.startswith(mounts["shared"] + "/")


def test_slurm_starts_a_process_a_node_with_all_its_gpus(repository):
    done = finish(slurm(repository, "0 0", *ARGUMENTS, SLURM_GPUS_ON_NODE="4"))
    assert done.returncode == 0, done.err
    assert requeued(repository) is None
    for number in range(2):
        call = called(repository, number)
        assert call["arguments"] == ["-m", "launch.sweep", *ARGUMENTS]
        assert call["variables"]["SLURM_STEP_NUM_TASKS"] == "2"
        assert call["variables"]["SLURM_PROCID"] == str(number)
        assert call["variables"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"
    assert not (repository / "runs" / "a b").exists()


def test_slurm_runs_another_command(repository):
    done = finish(slurm(repository, "0", TASKS="1", COMMAND="launch.train"))
    assert done.returncode == 0, done.err
    assert called(repository, 0)["arguments"] == ["-m", "launch.train", "--workdir=run"]
    assert "JAX_LOCAL_DEVICE_IDS" not in called(repository, 0)["variables"]


@pytest.mark.parametrize("endings", ["143 143", "waits 143", "143 waits"])
def test_slurm_puts_a_preempted_job_back_into_the_queue(repository, endings):
    done = finish(slurm(repository, endings))
    assert done.returncode == 143, done.err
    assert requeued(repository) == f"requeue {JOB}"


@pytest.mark.parametrize("endings", ["1 1", "1 waits", "waits 1"])
def test_slurm_does_not_start_a_failed_job_again(repository, endings):
    """Nor where the others, which wait for the failed one, are ended by a SIGTERM."""
    done = finish(slurm(repository, endings))
    assert done.returncode == 1, done.err
    assert requeued(repository) is None


def test_slurm_stops_and_requeues_ahead_of_the_time_limit(repository):
    process = slurm(repository, "waits waits")
    wait_until_called(repository, 2)
    process.send_signal(signal.SIGUSR1)
    assert finish(process).returncode == 143, process.err
    assert requeued(repository) == f"requeue {JOB}"


def test_slurm_hands_a_cancellation_on_and_does_not_requeue(repository):
    process = slurm(repository, "waits waits")
    wait_until_called(repository, 2)
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 143, process.err
    assert requeued(repository) is None


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (["--workdir=run"], {}, "no SLURM job"),
        (["--seed=1"], {"SLURM_JOB_ID": JOB}, "--workdir: is missing"),
        (["--workdir"], {"SLURM_JOB_ID": JOB}, "--workdir: is missing"),
    ],
)
def test_slurm_says_what_is_missing(repository, arguments, variables, named):
    done = finish(start(repository, SLURM, *arguments, **variables))
    assert done.returncode == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert named in line


@pytest.mark.parametrize("missing", [".venv", "launch"])
def test_slurm_says_where_to_start_it(repository, missing):
    path = repository / missing
    path.rename(repository / "elsewhere")
    done = finish(slurm(repository, "0 0"))
    assert done.returncode == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")


def test_slurm_finds_out_that_nodes_do_not_share_the_directory(repository):
    done = finish(slurm(repository, "0 0", AWAY="run"))
    assert done.returncode == 255
    assert "does not see run of the first node" in done.err
    assert requeued(repository) is None


@pytest.mark.slow
def test_a_sweep_is_preempted_requeued_and_ended_under_slurm(repository):
    """By two tasks, both real: ahead of the time limit they drop their chunks, and the next start goes on."""
    script(repository / ".venv/bin/python", "real")
    inputs, workdir = sweeps.inputs(repository, 20), repository / "run"
    chunk = f"--config.rows={sweeps.REPLACEMENTS}"  # a prompt each
    variables = dict(JAX_PLATFORMS="cpu", XLA_FLAGS="")

    def begin():
        return slurm(
            repository, "", *sweeps.settings(inputs, workdir), chunk, JAX_COORDINATOR_PORT=str(free_port()), **variables
        )

    process = begin()
    while not sweeps.written(workdir) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert finish(process).returncode == 143, process.err
    assert requeued(repository) == f"requeue {JOB}"
    before = sweeps.written(workdir)
    assert 0 < len(before) < 20
    again = finish(begin())
    assert again.returncode == 0, again.err
    assert before.items() <= sweeps.written(workdir).items()
    assert again.out.count("results in") == 1


def test_a_tpu_pod_runs_the_same_on_every_worker(repository, tmp_path):
    arguments = [*ARGUMENTS[:1], f"--workdir={tmp_path}/a b"]
    variables = dict(TPU="pod", ZONE="here", DIRECTORY=str(repository), ENDINGS="0 0")
    done = finish(start(repository, TPU, *arguments, **variables))
    assert done.returncode == 0, done.err
    for number in range(2):
        assert called(repository, number)["arguments"] == ["-m", "launch.sweep", "--coordinator=auto", *arguments]


@pytest.mark.parametrize(
    ("workdir", "variables", "named"),
    [
        ("/tmp/run", {}, "TPU and ZONE"),
        ("run", {"TPU": "pod", "ZONE": "here"}, "--workdir: is 'run'"),
    ],
)
def test_a_tpu_pod_says_what_is_missing(repository, workdir, variables, named):
    done = finish(start(repository, TPU, f"--workdir={workdir}", **variables))
    assert done.returncode == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_a_tpu_pod_is_stopped_on_every_worker(repository, tmp_path):
    variables = dict(TPU="pod", ZONE="here", DIRECTORY=str(repository), ENDINGS="waits 0")
    process = start(repository, TPU, f"--workdir={tmp_path}/run", **variables)
    wait_until_called(repository, 1)
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 143, process.err
