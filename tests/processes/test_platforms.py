"""launch/platforms: the numbers agree, flags arrive as they were given, and JAX reads the cluster that the files make.

No cluster is at hand: gcloud, srun and paged-dist-decode are played by scripts that note down their arguments.
"""

from __future__ import annotations

import glob
import math
import os
import pathlib
import re
import shlex
import socket
import subprocess
import tomllib
import types

import pytest
from jax._src.clusters import cloud_tpu_cluster
from platform_files import (
    PLATFORMS,
    TREE,
    container_of,
    flags_of_container,
    mesh_sizes_of,
    pod_spec_of,
    read_jobset,
    slice_shape,
    slices_of,
)

from paged_dist._compat import detect_cluster
from paged_dist.cluster import PREEMPTED
from paged_dist.launch import decode
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.host import has_accelerator
from paged_dist.mesh import topology as topology_module

SCRIPTS = ["slurm.sbatch", "tpu_vm.sh"]
LIMIT = 30  # seconds, for one script

# Flags that a shell would do something with, or lose.
HOSTILE = [
    '--trace=it\'s "a trace".csv',
    "--output=$(touch ran)`touch ran`$HOME",
    ";touch ran;",
    "&& touch ran | touch ran > ran",
    "",
    "  two  spaces ",
    "line\nbreak\ttab\\",
    "*",
    "~",
    "--",
    "é",
]


# The JobSet


@pytest.fixture(scope="module")
def jobset():
    return read_jobset()


@pytest.fixture(scope="module")
def slices(jobset):
    return slices_of(jobset)


@pytest.fixture(scope="module")
def pod_spec(slices):
    return pod_spec_of(slices)


@pytest.fixture(scope="module")
def container(pod_spec):
    return container_of(pod_spec)


def host_names(jobset, slices, index: int) -> list[str]:
    """What JobSet calls the pods of slice `index`, in order."""
    job = f"{jobset['metadata']['name']}-{slices['name']}-{index}"
    return [
        f"{job}-{i}.{jobset['spec']['network']['subdomain']}" for i in range(slices["template"]["spec"]["completions"])
    ]


def test_jobset_gives_its_pods_names_that_resolve_before_they_are_ready(jobset, slices):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] is True and network["publishNotReadyAddresses"] is True
    for name in host_names(jobset, slices, slices["replicas"] - 1):
        for label in name.split("."):
            assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", label)


def test_jobset_has_a_pod_a_host_and_puts_each_slice_in_a_node_pool_of_its_own(jobset, slices, pod_spec, container):
    job = slices["template"]["spec"]
    chips_a_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == math.prod(slice_shape(pod_spec)) / chips_a_host
    assert job["completionMode"] == "Indexed"
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"


def test_jobset_asks_for_all_chips_of_a_host(container):
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": 4}


def test_jobset_mesh_covers_the_chips_and_splits_the_heads(slices, pod_spec, container):
    sizes, values = mesh_sizes_of(container), flags_of_container(container)
    assert math.prod(sizes.values()) == slices["replicas"] * math.prod(slice_shape(pod_spec))
    assert int(values["num_kv_heads"]) % sizes["model"] == 0
    assert int(values["num_q_heads"]) % int(values["num_kv_heads"]) == 0


def test_jobset_runs_a_console_script_with_flags_that_it_has(container):
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    (command,) = container["command"]
    assert project["scripts"][command] == f"{decode.__name__}:cli"
    known = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(decode)}
    for name, value in flags_of_container(container).items():
        assert name in known
        known[name].parser.parse(value)


def test_jobset_waits_longer_for_a_pod_to_start_than_for_one_that_is_dead(container):
    times = flags_of_container(container)
    usual = flags.FLAGS["timeout_seconds"].default
    assert float(times["start_timeout_seconds"]) > float(times.get("timeout_seconds", usual))


def test_jobset_restarts_all_processes_after_a_preemption_and_none_after_a_failure(jobset, slices, pod_spec, container):
    job = slices["template"]["spec"]
    assert pod_spec["restartPolicy"] == "Never"  # which podFailurePolicy needs, too
    assert job["backoffLimit"] == 0
    rules = job["podFailurePolicy"]["rules"]
    codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    assert codes == [{"containerName": container["name"], "operator": "In", "values": [PREEMPTED]}]
    assert [rule["action"] for rule in rules] == ["FailJob"] * len(rules)  # of a reason of its own, PodFailurePolicy
    policy = jobset["spec"]["failurePolicy"]
    first, last = policy["rules"]
    assert (first["action"], first["onJobFailureReasons"]) == ("RestartJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] >= 1
    # Where no rule matches, JobSet restarts.
    assert last["action"] == "FailJobSet" and "onJobFailureReasons" not in last


def test_jobset_writes_its_output_on_a_volume_that_all_hosts_share(pod_spec, container):
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (volume,) = (
        v
        for v in pod_spec["volumes"]
        if v["name"] == mounts[str(pathlib.PurePath(flags_of_container(container)["output"]).parent)]
    )
    assert volume["persistentVolumeClaim"]["claimName"]


def test_jobset_names_the_port_that_jax_takes_for_the_coordinator(container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["coordinator"] == int(cloud_tpu_cluster.coordinator_port)
    assert len(set(ports.values())) == len(ports)


# The scripts


@pytest.fixture
def played(tmp_path):
    """`played(path, *arguments, **environment)` runs a script, with the programs that it calls played by `programs`."""
    bin_folder, home, work = tmp_path / "bin", tmp_path / "home", tmp_path / "work"
    for folder in (bin_folder, home / ".local" / "bin", work):
        folder.mkdir(parents=True)

    def program(name, body, folder=bin_folder):
        path = folder / name
        note = f'for word; do printf "%s\\0" "$word"; done >{shlex.quote(str(tmp_path / name))}'
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def run(*command, **environment):
        environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(home), "LC_ALL": "C.UTF-8"} | environment
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
        )
        assert list(work.iterdir()) == [], "a flag was run by a shell"
        return done

    def arguments(name):
        """What the program was called with; None where it was not."""
        noted = tmp_path / name
        return noted.read_bytes().decode().split("\0")[:-1] if noted.exists() else None

    return types.SimpleNamespace(program=program, run=run, arguments=arguments, home_bin=home / ".local" / "bin")


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_bash_and_stops_at_an_error(script):
    path = PLATFORMS / script
    subprocess.run(["bash", "-n", path], check=True, timeout=LIMIT)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and os.access(path, os.X_OK)
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    assert not re.search(r"\beval\b", "\n".join(code))


@pytest.mark.parametrize(
    "arguments", [[], ["--model=8", "--output=run.jsonl"], HOSTILE], ids=["none", "usual", "hostile"]
)
def test_flags_reach_the_tpu_vms_as_they_were_given(played, arguments):
    played.program("gcloud", "exit 0")
    played.program("paged-dist-decode", "exit 0", folder=played.home_bin)
    done = played.run(PLATFORMS / "tpu_vm.sh", "my-slice", "us-east5-a", "--", *arguments)
    assert done.returncode == 0, done.stderr
    *words, command = played.arguments("gcloud")
    assert words == ["compute", "tpus", "tpu-vm", "ssh", "my-slice", "--zone=us-east5-a", "--worker=all"]
    # gcloud takes the command apart at spaces, ssh joins it with spaces, and the host's shell gets the line.
    line = " ".join(command.removeprefix("--command=").split(" "))
    assert command.startswith("--command=") and played.run("bash", "-c", line).returncode == 0
    assert played.arguments("paged-dist-decode") == arguments


@pytest.mark.parametrize("code", [0, 3, PREEMPTED])
def test_tpu_vm_script_ends_as_gcloud_does(played, code):
    played.program("gcloud", f"exit {code}")
    assert played.run(PLATFORMS / "tpu_vm.sh", "my-slice", "us-east5-a").returncode == code


@pytest.mark.parametrize(("first", "environment"), [(["--dry_run"], {}), ([], {"DRY_RUN": "1"})])
def test_dry_run_prints_what_would_be_run_and_runs_nothing(played, first, environment):
    played.program("gcloud", "exit 0")
    call = ["my-slice", "us-east5-a", "--", *HOSTILE]
    dry = played.run(PLATFORMS / "tpu_vm.sh", *first, *call, **environment)
    assert dry.returncode == 0 and played.arguments("gcloud") is None
    assert played.run("bash", "-c", dry.stdout).returncode == 0
    pasted = played.arguments("gcloud")
    played.run(PLATFORMS / "tpu_vm.sh", *call)
    assert pasted == played.arguments("gcloud")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["my-slice"],
        ["my-slice", ""],
        ["--zone=us-east5-a", "my-slice"],
        ["my-slice", "--model=8"],
        ["my-slice", "us-east5-a", "--model=8"],
        ["my-slice", "us-east5-a", "--dry_run"],
    ],
)
def test_tpu_vm_script_explains_itself_where_arguments_are_wrong(played, arguments):
    played.program("gcloud", "exit 0")
    done = played.run(PLATFORMS / "tpu_vm.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: tpu_vm.sh") and played.arguments("gcloud") is None


def sbatch_options() -> dict[str, str]:
    """The options that sbatch reads: those before the first command."""
    options = {}
    for line in (PLATFORMS / "slurm.sbatch").read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            options[match[1]] = match[2]
    return options


@pytest.mark.parametrize(
    "arguments", [[], ["--model=8", "--output=run.jsonl"], HOSTILE], ids=["none", "usual", "hostile"]
)
def test_flags_reach_the_slurm_step_as_they_were_given(played, arguments):
    played.program("srun", 'while [[ $1 == -* ]]; do shift; done; "$@"')
    played.program("paged-dist-decode", 'echo "${JAX_NUM_PROCESSES-} ${JAX_PROCESS_ID-}"')
    stale = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
    done = played.run("bash", PLATFORMS / "slurm.sbatch", *arguments, **stale)
    assert (done.returncode, done.stdout) == (0, " \n"), done.stderr
    assert played.arguments("srun") == ["--kill-on-bad-exit=1", "paged-dist-decode", *arguments]
    assert played.arguments("paged-dist-decode") == arguments


@pytest.mark.parametrize("code", [1, 3, PREEMPTED])
def test_slurm_job_ends_with_the_steps_exit_code(played, code):
    played.program("srun", f"exit {code}")
    assert played.run("bash", PLATFORMS / "slurm.sbatch").returncode == code


def test_slurm_and_gke_ask_in_time_for_the_partial_result(pod_spec):
    options = sbatch_options()
    # Without a B: the signal goes to the processes, not to the script.
    seconds = int(re.fullmatch(r"TERM@(\d+)", options["signal"])[1])
    assert seconds == pod_spec["terminationGracePeriodSeconds"] >= 30
    hours, minutes, rest = map(int, options["time"].split(":"))
    assert seconds < 3600 * hours + 60 * minutes + rest


# What JAX makes of it


@pytest.fixture
def no_cluster(monkeypatch):
    """No variable here that JAX would take for a cluster's."""
    for name in list(os.environ):
        if name.startswith(("JAX_COORDINATOR", "SLURM_", "OMPI_", "PMI", "TPU_", "MEGASCALE_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)


def host(root, file, *devices):
    """A host's /dev and /sys: a device file, and the (vendor, class) of the PCI devices behind it."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).touch()
    name = pathlib.PurePath(file).name
    for i, (vendor, kind) in enumerate(devices):
        of_group = root / "sys/kernel/iommu_groups" / name / "devices" / f"0000:00:0{i}.0"
        folder = of_group if "vfio" in file else root / "sys/class/accel" / name / "device"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")


TPU, GOOGLES_CARD = ("0x1ae0", "0x120000"), ("0x1ae0", "0x020000")
INTELS_CARD, INTELS_NPU, BRIDGE = ("0x8086", "0x020000"), ("0x8086", "0x120000"), ("0x1022", "0x060400")


@pytest.mark.parametrize(
    ("file", "devices", "tpu"),
    [
        ("dev/vfio/12", [TPU], True),
        ("dev/vfio/12", [BRIDGE, TPU], True),
        ("dev/vfio/12", [], True),  # a container without /sys
        ("dev/vfio/12", [INTELS_CARD], False),
        ("dev/vfio/12", [GOOGLES_CARD], False),
        ("dev/vfio/vfio", [], False),  # of the driver itself
        ("dev/accel0", [TPU], True),
        ("dev/accel0", [], True),
        ("dev/accel/accel0", [TPU], True),
        ("dev/accel/accel0", [INTELS_NPU], False),
        ("dev/null", [], False),
    ],
)
def test_a_host_has_tpus_where_google_s_devices_are_behind_the_files(tmp_path, file, devices, tpu):
    host(tmp_path, file, *devices)
    assert topology_module.has_tpu_chips(str(tmp_path)) == tpu


@pytest.mark.parametrize("tpu", [False, True])
def test_a_network_card_in_user_space_lets_a_launcher_run_on_cpu_devices(monkeypatch, tmp_path, tpu):
    host(tmp_path, "dev/vfio/12", TPU if tpu else INTELS_CARD)
    real = glob.glob
    under = lambda path: real(path if path.startswith(str(tmp_path)) else str(tmp_path) + path)
    monkeypatch.setattr(glob, "glob", under)  # of the two modules, too
    assert has_accelerator() == tpu
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    topology_module._keep_libtpu_offline()
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == (not tpu)


@pytest.mark.parametrize("nodes", ["node[001-004]", "node[001,007-009]", "node001,other[1-3]", "node001,a,b,c"])
def test_jax_reads_the_processes_of_the_slurm_step(monkeypatch, no_cluster, nodes):
    options = sbatch_options()
    assert options["ntasks-per-node"] == "1"
    count = int(options["nodes"])
    monkeypatch.setenv("SLURM_JOB_ID", "4100")
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    monkeypatch.setenv("SLURM_NTASKS", str(count))
    monkeypatch.setenv("SLURM_LOCALID", "0")
    for i in range(count):
        monkeypatch.setenv("SLURM_PROCID", str(i))
        assert detect_cluster(5) == ("slurm", f"node001:{61440 + 4100 % 4096}", count, i)


def test_a_shell_inside_a_slurm_allocation_is_no_process_of_a_step(monkeypatch, no_cluster):
    monkeypatch.setenv("SLURM_JOB_ID", "4100")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert detect_cluster(5) is None


@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize("skip", [True, False], ids=["metadata is skipped", "metadata has nothing"])
def test_jax_reads_the_processes_of_the_jobset(monkeypatch, no_cluster, jobset, slices, num_slices, skip):
    hosts = [host_names(jobset, slices, i) for i in range(num_slices)]
    resolved = []
    # A stand-in for the chips and libtpu that make a host a TPU's, for its metadata server and for the cluster's DNS.
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("not found", 404))
    names = types.SimpleNamespace(gethostbyname=resolved.append, gaierror=socket.gaierror)
    monkeypatch.setattr(cloud_tpu_cluster, "socket", names)
    if skip:
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "true")
    coordinator, port = hosts[0][0], cloud_tpu_cluster.coordinator_port
    ids = []
    for i in range(num_slices):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(hosts[i]))
        if num_slices > 1:
            monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", f"{coordinator}:8080")
            monkeypatch.setenv("MEGASCALE_NUM_SLICES", str(num_slices))
            monkeypatch.setenv("MEGASCALE_SLICE_ID", str(i))
        for worker in range(len(hosts[i])):
            monkeypatch.setenv("TPU_WORKER_ID", str(worker))
            *found, process_id = detect_cluster(5)
            assert found == ["gketpu", f"{coordinator}:{port}", num_slices * len(hosts[0])]
            ids.append(process_id)
    assert ids == list(range(num_slices * slices["template"]["spec"]["parallelism"]))
    assert set(resolved) == {coordinator}
