"""Cluster files: what ships parses, what is wrong says so in one line, and no value can become shell code."""

import re
from pathlib import Path

import pytest
import yaml

from jet_launcher.clusters import find_cluster, known_clusters, load_cluster
from megatron_jet.configs.cluster import ClusterConfig, ContainerConfig, PreflightConfig, TunnelConfig
from megatron_jet.configs.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "slurm" / "clusters" / "example_h100.yaml"
BAD_FILES = {
    "not_yaml": ("partition: [a\n", "not valid YAML"),
    "not_a_mapping": ("- a\n- b\n", "a cluster file is a mapping"),
    "empty": ("", "a cluster file is a mapping"),
    "typo": ("partitoin: batch\n", "partitoin: unknown key, did you mean 'partition'?"),
    "nested_typo": ("preflight: {free_disk: 3}\n", "preflight.free_disk: unknown key"),
    "zero_nodes": ("nodes: 0\n", "nodes: Input should be greater than or equal to 1 (got 0)"),
    "text_for_number": ("nodes: many\n", "nodes: Input should be a valid integer"),
    "true_for_number": ("nodes: true\n", "nodes: Input should be a valid integer"),
    "yes_for_number": ("gpus_per_node: yes\n", "gpus_per_node: Input should be a valid integer"),
    "twice": ("account: a\npartition: b\naccount: c\n", "'account' is given twice, again in line 3"),
    "twice_below": ("env:\n  A: a\n  A: b\n", "'A' is given twice, again in line 3"),
    "warning_beyond_sbatch": (
        'time_limit: "3-00:00:00"\nearly_warning_seconds: 70000\n',
        "less than or equal to 65535",
    ),
    "endless_bandwidth": ("preflight: {min_bandwidth_gb_per_s: .inf}\n", "min_bandwidth_gb_per_s: Input should be a"),
    "endless_disk": ("preflight: {free_disk_gib: inf}\n", "free_disk_gib: Input should be a finite number"),
    "word_for_list": ("modules: cuda\n", "modules: write a list, for example [a, b] (got 'cuda')"),
    "word_for_mapping": ("preflight: no\n", "preflight: write a mapping, one `key: value` per line (got 'no')"),
    "list_for_text": ("account: [a]\n", "account: write text (got ['a'])"),
    "negative_gpus": ("gpus_per_node: -1\n", "gpus_per_node: Input should be greater than or equal to 0"),
    "time_as_a_number": ("time_limit: 720\n", "time_limit: write [days-]hours:minutes:seconds"),
    "time_in_words": ('time_limit: "4 hours"\n', "time_limit: write"),
    "late_warning": ('time_limit: "00:01:00"\nearly_warning_seconds: 60\n', "is not below time_limit"),
    "container_and_venv": ("container: {image: a}\nvenv: /v\n", "give container or venv, not both"),
    "relative_venv": ("venv: .venv\n", "venv: must be an absolute path"),
    "space_in_path": ('job_dir: "/my runs"\n', "job_dir: may hold letters"),
    "mount_without_target": ("container: {image: a, mounts: [/data]}\n", "write source:target"),
    "unknown_scheduler": ("scheduler: pbs\n", "scheduler: Input should be 'local' or 'slurm'"),
    "ssh_without_host": ("tunnel: {kind: ssh}\n", "kind: ssh needs a host"),
    "host_without_ssh": ("tunnel: {host: h}\n", "need kind: ssh"),
    "owned_variable": ("env: {MASTER_PORT: 1}\n", "MASTER_PORT is set by the launcher"),
    "bad_variable": ("env: {A-B: 1}\n", "is not the name of an environment variable"),
    "nothing_in_env": ("env: {A: }\n", 'A: write text, "" for none'),
    "list_in_env": ("env: {A: [b]}\n", 'A: write text, "" for none'),
    "owned_option": ("sbatch: {time: '1'}\n", "time is set by the launcher or has a field of its own"),
    "option_of_another_cluster": ("sbatch: {clusters: west}\n", "clusters is set by the launcher"),
    "option_that_submits_nothing": ("sbatch: {help: ''}\n", "help is set by the launcher"),
    "option_that_hides_the_job_id": ("sbatch: {quiet: ''}\n", "quiet is set by the launcher"),
    "het_group": ("sbatch: {het-group: '1'}\n", "het-group is set by the launcher"),
    "gpus_of_the_job": (
        "sbatch: {gpus: h100:16}\n",
        "gpus counts GPUs otherwise; use the fields gpus_per_node, gpu_type",
    ),
    "gpus_of_a_process": ("sbatch: {gpus-per-task: h100:1}\n", "gpus-per-task counts GPUs otherwise"),
    "gres": (
        "sbatch: {gres: gpu:a100:4}\n",
        "gres is set by the launcher; see gpus_per_node, gpu_type and gpu_request",
    ),
    "gpu_type_with_a_number": ("gpu_type: a100:4\n", "gpu_type: write a type as Slurm's gres.conf has it"),
    "two_clusters": ("clusters: east,west\n", "clusters: write the name of one cluster"),
    "account_with_blanks": ("account: a b\n", "account: may hold letters, digits and _ . @ : + , / - only"),
    "abbreviated_option": ("sbatch: {clust: west}\n", "sbatch takes clust for clusters; write options in full"),
    "short_option": ("sbatch: {-N: '1'}\n", "is not an sbatch option"),
    "unset_variable": ("account: ${NO_SUCH_THING}\n", "account: ${NO_SUCH_THING} is not set in your environment"),
    "odd_variable": ("account: ${a b}\n", "'${a b}' does not name an environment variable"),
}
NAME_FIELDS = ("account", "partition", "qos", "reservation", "constraint", "exclude", "mem")
HOSTILE = ("a\nb", "a'b", 'a"b', "a;b", "$(touch x)", "`x`", "a b", "a\\b", "a\tb", "a\x00b", "-x", "a&&b|", "")


def write(tmp_path, text) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["example_h100", "local", "local_slurm"])
def test_shipped_files_parse(name):
    assert load_cluster(name, {"HOME": "/home/me"}).scheduler in ("local", "slurm")


def test_example_shows_and_explains_every_field():
    text = EXAMPLE.read_text()
    data = yaml.safe_load(text)
    assert set(data) == set(ClusterConfig.model_fields)
    assert set(data["preflight"]) == set(PreflightConfig.model_fields)
    assert set(data["container"]) == set(ContainerConfig.model_fields)
    for field in TunnelConfig.model_fields:
        assert re.search(rf"^  (# )?{field}: ", text, re.MULTILINE), field
    for field in ClusterConfig.model_fields:
        assert re.search(rf"^{field}:.*# ", text, re.MULTILINE), f"{field} has no explanation beside it"


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_gives_one_line_that_names_file_and_key(tmp_path, name):
    text, message = BAD_FILES[name]
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_cluster(path, {})
    assert path in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", NAME_FIELDS)
@pytest.mark.parametrize("value", HOSTILE)
def test_names_take_no_shell_characters(field, value):
    if (field, value) == ("constraint", "a&&b|"):
        return  # Slurm's own operators; the option is quoted
    with pytest.raises(UserError, match=field):
        ClusterConfig.parse({field: value})


@pytest.mark.parametrize("value", ["a\nb", "a\x07b", "a\rb", "a\x1b[0m"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: {"env": {"A": v}},
        lambda v: {"setup": [v]},
        lambda v: {"modules": [v]},
        lambda v: {"sbatch": {"comment": v}},
        lambda v: {"preflight": {"command": v}},
        lambda v: {"container": {"image": v}},
        lambda v: {"container": {"image": "a", "mounts": [f"/a:/b{v}"]}},
        lambda v: {"job_dir": f"/a{v}"},
        lambda v: {"tunnel": {"kind": "ssh", "host": v}},
    ],
)
def test_control_characters_are_refused_everywhere(wrap, value):
    with pytest.raises(UserError):
        ClusterConfig.parse(wrap(value))


def test_slurm_syntax_is_let_through():
    cluster = ClusterConfig.parse(
        {"constraint": "[rack1|rack2]&h100", "exclude": "node[001-003],n9", "partition": "a,b", "mem": 0}
    )
    assert cluster.mem == "0"
    assert cluster.constraint == "[rack1|rack2]&h100"


def test_plain_values_stay_what_the_file_shows(tmp_path):
    """YAML 1.1 reads these as 4227, 750, 8, True, 1.1, 43200 and 960."""
    text = (
        "account: 010203\npartition: 12:30\nqos: 010\nreservation: yes\nmodules: [1.10]\ntime_limit: 12:00:00\n"
        "nodes: 010\nexclusive: yes\nmem: null\nsbatch: {begin: 16:00}\n"
        "env: {T: 12:30, V: 1.10, Y: yes, N: 1_000, ON: ~x}\n"
    )
    cluster = load_cluster(write(tmp_path, text), {})
    assert (cluster.account, cluster.partition, cluster.qos, cluster.reservation) == ("010203", "12:30", "010", "yes")
    assert (cluster.modules, cluster.time_limit, cluster.sbatch) == (("1.10",), "12:00:00", {"begin": "16:00"})
    assert (cluster.nodes, cluster.exclusive, cluster.mem) == (10, True, None)
    assert cluster.env == {"T": "12:30", "V": "1.10", "Y": "yes", "N": "1_000", "ON": "~x"}


def test_merged_mappings_are_no_repetition(tmp_path):
    text = "env: &common {A: 1, B: 2}\nsbatch: {}\npreflight: {<<: {timeout_seconds: 9}, timeout_seconds: 7}\n"
    cluster = load_cluster(write(tmp_path, text), {})
    assert (cluster.env, cluster.preflight.timeout_seconds) == ({"A": "1", "B": "2"}, 7)


@pytest.mark.parametrize("field", ["account", "partition", "qos", "reservation", "constraint", "exclude", "mem"])
def test_numbers_are_names_everywhere(field):
    assert getattr(ClusterConfig.parse({field: 5}), field) == "5"


@pytest.mark.parametrize("field", ["nodes", "gpus_per_node", "cpus_per_task", "early_warning_seconds", "restarts"])
def test_truth_values_are_no_numbers(field):
    with pytest.raises(UserError, match=f"{field}: write a number"):
        ClusterConfig.parse({field: True})


def test_variables_come_from_the_login_environment_but_shell_code_keeps_its_own(tmp_path):
    text = (
        "account: ${TEAM}\nenv: {A: '${TEAM}/$HOME', B: '$${TEAM}', C: 3}\n"
        "setup: ['cd ${SLURM_TMPDIR}']\npreflight: {command: 'echo ${NODE}'}\n"
    )
    cluster = load_cluster(write(tmp_path, text), {"TEAM": "blue"})
    assert cluster.account == "blue"
    assert cluster.env == {"A": "blue/$HOME", "B": "${TEAM}", "C": "3"}
    assert cluster.setup == ("cd ${SLURM_TMPDIR}",)
    assert cluster.preflight.command == "echo ${NODE}"


def test_a_variable_cannot_smuggle_in_what_the_file_may_not_hold(tmp_path):
    with pytest.raises(UserError, match="account: may hold"):
        load_cluster(write(tmp_path, "account: ${TEAM}\n"), {"TEAM": "a; touch /tmp/x"})


def test_users_own_files_hide_shipped_ones(tmp_path):
    folder = tmp_path / "megatron_jet" / "clusters"
    folder.mkdir(parents=True)
    (folder / "local_slurm.yaml").write_text("partition: mine\n")
    (folder / "big.yaml").write_text("partition: big\n")
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert load_cluster("local_slurm", environment).partition == "mine"
    assert known_clusters(environment)["big"] == folder / "big.yaml"
    assert find_cluster("example_h100", environment) == EXAMPLE


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="did you mean 'example_h100'.*known: example_h100, local, local_slurm"):
        find_cluster("exampel_h100", {"HOME": str(tmp_path)})
    with pytest.raises(UserError, match="no such cluster file"):
        find_cluster("some/where.yaml")


@pytest.mark.parametrize(("text", "seconds"), [("00:10:00", 600), ("04:00:00", 14400), ("2-01:00:01", 176401)])
def test_time_limit_in_seconds(text, seconds):
    assert ClusterConfig(time_limit=text).time_limit_seconds == seconds
