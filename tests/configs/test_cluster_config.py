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
    "negative_gpus": ("gpus_per_node: -1\n", "gpus_per_node: Input should be greater than or equal to 0"),
    "sexagesimal_time": ("time_limit: 12:00:00\n", "time_limit: YAML reads this as a number; put it in quotes"),
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
    "yes_in_env": ("env: {A: yes}\n", "A: put the value in quotes"),
    "owned_option": ("sbatch: {time: '1'}\n", "time is set by the launcher or has a field of its own"),
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
