"""The cluster as an application of Ray Serve: entrances in front of replicas."""

from prometheus_client.core import Metric
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from server.cluster.entrance import create_entrance
from server.cluster.members import Members
from server.cluster.overview import labelled
from server.cluster.replica import Replica
from server.cluster.routing import ConversationRouter
from server.cluster.settings import ClusterSettings
from server.logs import configure_logs
from server.metrics import Metrics

# Memory of a replica beside the KV and prefix caches: a 0.5B model's weights and their loading.
MODEL_MIB = 1024
# Never reached: Serve's own refusal is not in OpenAI's error shape.
UNLIMITED = 100_000
# Room for status requests, such as those of `/metrics`, at a replica that is full.
NUM_STATUS_REQUESTS = 64


@serve.ingress()
class Entrance:
    """The process to which Serve sends requests."""

    def __init__(self, settings: ClusterSettings, replicas: DeploymentHandle) -> None:
        configure_logs(settings.log_level, settings.log_format)
        context = serve.get_replica_context()
        self._settings, self._replicas = settings, replicas
        self._name, self._metrics = context.replica_tag, Metrics()
        self._entrances = serve.get_deployment_handle(context.deployment, context.app_name)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Serve."""
        members = Members(self._entrances, self._replicas)
        return create_entrance(self._settings, self._metrics, members)

    def metrics(self) -> list[Metric]:
        """The entrance's metrics, each with the label `replica`."""
        return labelled(self._metrics.registry, self._name)


def build(settings: ClusterSettings) -> Application:
    """The application; `server.cluster.deployment:build` for `serve run` and `serve deploy`."""
    max_requests = settings.max_num_seqs + settings.max_queue
    replicas = serve.deployment(
        Replica,
        **_number(settings),
        max_ongoing_requests=max_requests + NUM_STATUS_REQUESTS,
        # At each entrance while no replica runs: as many as all replicas admit.
        max_queued_requests=max_requests * (settings.max_replicas or settings.num_replicas),
        request_router_config=RequestRouterConfig(
            request_router_class=ConversationRouter,
            request_router_kwargs={
                "max_num_seqs": settings.max_num_seqs,
                "max_requests": max_requests,
            },
        ),
        graceful_shutdown_timeout_s=settings.grace_period,
        ray_actor_options={
            "num_cpus": settings.num_threads,
            "memory": (settings.max_kv_mib + settings.max_prefix_mib + MODEL_MIB) * 2**20,
            # The effect of `share_one_heap`, which only works before any thread starts.
            "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "1"}},
        },
    )
    entrances = serve.deployment(
        Entrance,
        num_replicas=settings.num_entrances,
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=settings.grace_period,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    )
    return entrances.bind(settings, replicas.bind(settings))


def _number(settings: ClusterSettings) -> dict[str, int | AutoscalingConfig]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.num_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.num_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.max_num_seqs,
        )
    }
