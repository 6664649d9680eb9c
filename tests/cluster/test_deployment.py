"""The deployment that follows from the settings, and errors of the command's options."""

import importlib.util
import socket
import sys
from pathlib import Path

import pytest
import yaml

from server.__main__ import main
from tests.processes import closed_port
from tests.settings_table import settings_table

pytest.importorskip("ray", reason="Ray is not installed, which the extra 'cluster' brings")
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from server.cluster import deployment
from server.cluster.settings import ClusterSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_a_replica_has_the_threads_and_the_memory_of_the_settings() -> None:
    settings = ClusterSettings(num_threads=3, max_kv_mib=100, max_prefix_mib=10, num_replicas=4)
    replica, entrance = build_app(deployment.build(settings), name="qwen").deployments
    options = replica.ray_actor_options
    assert options["num_cpus"] == 3
    assert options["memory"] == (110 + deployment.MODEL_MIB) * 2**20
    assert (replica.name, replica.num_replicas) == ("Replica", 4)
    assert (entrance.name, entrance.num_replicas) == ("Entrance", 1)


def test_with_max_replicas_their_number_follows_the_load() -> None:
    settings = ClusterSettings(num_replicas=2, max_replicas=5, max_num_seqs=8)
    replica, _ = build_app(deployment.build(settings), name="qwen").deployments
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 8


def test_the_example_configuration_is_valid() -> None:
    content = yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text(encoding="utf-8"))
    [app] = ServeDeploySchema.model_validate(content).applications
    assert app.import_path == f"{deployment.__name__}:{deployment.build.__name__}"
    assert set(app.args) <= set(ClusterSettings.model_fields)
    assert ClusterSettings.model_validate(app.args).host == content["http_options"]["host"]


def test_without_ray_the_command_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs Ray; pip install 'qwen-all-in-one[cluster]'" in refusal(monkeypatch)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num-replicas", "3", "--max-replicas", "2"], "must be at least 3 (--num-replicas)"),
        (["--ui"], "error: --ui True: a cluster does not support it; leave it out"),
        (["--check"], "error: --check True: a cluster does not support it; leave it out"),
        (["--engine", "http://a:1"], "--engine 'http://a:1': a cluster does not support it; leave"),
        (["--port", "0"], "error: --port '0'"),
        (["--api-key-file", "none"], "cannot read --api-key-file none"),
        (["--ssl-keyfile", "key.pem"], "cannot serve https with --ssl-certfile"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    assert sentence in refusal(monkeypatch, *options)


def test_a_port_in_use_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        sentence = refusal(monkeypatch, "--port", str(port))
    assert sentence.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")


def test_an_unreachable_ray_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    sentence = refusal(monkeypatch, "--port", str(closed_port()))
    assert sentence.startswith(f"error: no Ray cluster answers at RAY_ADDRESS={address}: ")


def test_a_ray_that_cannot_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError("The node has too little memory.\nMore of it.")

    monkeypatch.setattr("ray.init", fail)
    sentence = refusal(monkeypatch, "--port", str(closed_port()))
    assert sentence == "error: Ray cannot start: The node has too little memory."


def refusal(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["server", "cluster", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    return str(stopped.value.code)


def test_the_table_of_options_is_complete_and_true() -> None:
    own = ClusterSettings.__annotations__.keys() - {"ui"}
    fields = ClusterSettings.model_fields.items()
    table = settings_table({name: field for name, field in fields if name in own})
    assert table in TEXT, f"docs/cluster.md should contain\n\n{table}"
