"""Share a teacher: `python -m teacher_serving.serve --config configs/teacher/demo.yaml key=value …`.

In:  a ServeConfig (teacher_serving/serve_config.py): YAML files, merged from left to right, then overrides.
Out: a Ray Serve application, for runs of the same cluster (`teacher: {kind: served, app: teacher}`) and over HTTP for all
     others (`address: http://HOST:PORT`), until SIGTERM or SIGINT, which lets requests in work come to their end.

Two deployments: `Teacher`, an engine in every replica (replica.py), as many as there is work for; and `Gateway`
(gateway.py), HTTP in front of them. Runs in the same cluster talk to the engines directly.
Exit code: 0 stopped by a signal, 1 something the user can mend.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client

from teacher_serving.actor import teacher_environment
from teacher_serving.connect import cpu_environment, resolve_device
from teacher_serving.gateway import Gateway, Opening, digest_of
from teacher_serving.http_calls import read_key
from teacher_serving.identity import describe
from teacher_serving.replica import TeacherReplica
from teacher_serving.serve_config import ENGINES, ServeConfig
from teacher_serving.yaml_config import load

logger = logging.getLogger("teacher_serving.serve")  # started with -m, __name__ is __main__

POLL_S = 1.0
GATEWAY_CPUS = 0.1
"""Of the gateway, which mostly waits."""
PROXY_START_S = 120
"""How long Ray Serve's HTTP proxy may take to start."""
MAX_START_TRIES = 2
"""How often an engine that fails to start is tried before the service gives up."""


class Stopped(BaseException):
    """A signal asks the service to end: wherever it is at, requests in work are waited for and all goes down."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors: ValueError for what the user can mend."""
    config = load(ServeConfig, *_words(argv))
    info = describe(config.teacher)
    key_digest = read_key_digest(config)
    started_ray = start_ray(config)
    try:
        config = check_cluster(config)
        logger.info(
            "starting %s: %d tokens of context, top_k up to %d", info.teacher_id, info.max_model_len, config.teacher.top_k
        )
        run(config, key_digest)
    finally:
        if started_ray:
            serve.shutdown()
        ray.shutdown()
    return 0


def run(config: ServeConfig, key_digest: bytes | None) -> None:
    """Start the application, leave it running until a signal comes, stop it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        start(config, key_digest)
        logger.info("serving at %s, and in its own cluster as app %r", address_of(config), config.app)
        watch(config)
    except Stopped:
        logger.info("stopping: requests in work have %g s", config.drain_timeout_s)
    finally:
        stop(config)


def _words(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE|key=value")
    args, rest = parser.parse_known_args(argv)
    words = [*args.config, *rest]
    if unknown := [word for word in rest if "=" not in word or word.startswith("-")]:
        parser.error(f"unrecognised arguments: {' '.join(unknown)}")
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _stop(number: int, frame: FrameType | None) -> None:
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)  # one is enough
    raise Stopped


def read_key_digest(config: ServeConfig) -> bytes | None:
    """Hash of the key in the environment. Raises ValueError where the variable is named and not set."""
    key = read_key(config.api_key_env, "api_key_env")
    return None if key is None else digest_of(key)


def start_ray(config: ServeConfig) -> bool:
    """Connect to a running cluster, else start a local Ray; whether it was started."""
    if ray.is_initialized():
        return False
    try:
        ray.init(address=config.ray_address or "auto", logging_level=logging.WARNING)
    except ConnectionError as error:
        if address := config.ray_address or os.environ.get("RAY_ADDRESS"):
            raise ValueError(f"no Ray cluster answers at {address!r}: start one, or leave ray_address empty") from error
        ray.init(num_cpus=max(8, os.cpu_count() or 1), logging_level=logging.WARNING)
        return True
    return False


def check_cluster(config: ServeConfig) -> ServeConfig:
    """The config for the devices that there are. Raises ValueError where the cluster has no room, or the name is taken."""
    resources = ray.cluster_resources()
    teacher = resolve_device(config.teacher, has_gpu=resources.get("GPU", 0) > 0)
    for name, each in (("GPU", teacher.gpus_per_actor), ("CPU", teacher.num_cpus)):
        if each * teacher.num_replicas > resources.get(name, 0):
            raise ValueError(
                f"{teacher.num_replicas} engines of {each:g} {name}s each, but the cluster has {resources.get(name, 0):g}: "
                "lower teacher.num_replicas or what each takes, or add nodes"
            )
    status = serve.status()
    if config.app in status.applications:
        raise ValueError(
            f"app={config.app} is running in this cluster already: choose another app and route, or stop that one"
        )
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None and (at := (client.http_config.host, client.http_config.port)) != (config.host, config.port):
        raise ValueError(
            f"host={config.host} and port={config.port}, but Ray Serve runs in this cluster already and listens on {at[0]}:"
            f"{at[1]}, once for all applications: set those, and a route of its own"
        )
    if client is None and not _is_free(config.host, config.port):
        raise ValueError(f"port={config.port} of {config.host} is in use: choose another port")
    return config.model_copy(update={"teacher": teacher})


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def start(config: ServeConfig, key_digest: bytes | None) -> None:
    """Start the application; blocks until its engines are ready. Raises ValueError where they do not start."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": config.port},
        # Ray Serve's 5 s are too few on a busy machine: it kills its proxy, and with it this start.
        controller_options={"runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(PROXY_START_S)}}},
    )
    try:
        serve.run(
            application(config, key_digest),
            name=config.app,
            route_prefix=config.route,
            logging_config={"enable_access_log": False},  # the metrics have it
        )
    except RuntimeError as error:
        status = serve.status().applications.get(config.app)
        problems = [one.message for one in status.deployments.values() if one.message] if status else []
        raise ValueError(f"the teacher does not start: {' '.join(problems) or error}") from error


def application(config: ServeConfig, key_digest: bytes | None) -> serve.Application:
    """The two deployments, not yet running. The teacher's device must be resolved."""
    teacher = config.teacher
    variables = cpu_environment(teacher) if teacher.device == "cpu" else {}
    common = {
        "health_check_period_s": config.health_check_period_s,
        "health_check_timeout_s": config.health_check_timeout_s,
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "max_constructor_retry_count": MAX_START_TRIES,
    }
    engines = serve.deployment(TeacherReplica).options(
        name=ENGINES,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={
            "num_cpus": teacher.num_cpus,
            "num_gpus": teacher.gpus_per_actor,
            "runtime_env": {"env_vars": variables | teacher_environment()},
        }
        | ({"label_selector": teacher.node_labels} if teacher.node_labels else {}),
        **scale(config),
        **common,
    )
    gateway = serve.deployment(Gateway).options(
        name="Gateway",
        max_ongoing_requests=config.max_ongoing_requests + config.max_queued_requests,
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        **common,
    )
    return gateway.bind(Opening(config, key_digest), engines.bind(teacher))


def scale(config: ServeConfig) -> dict[str, object]:
    """How many engines: a number, or between which numbers and by what load."""
    least, most = config.teacher.num_replicas, config.teacher.max_replicas or config.teacher.num_replicas
    if least == most:
        return {"num_replicas": least}
    load = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=config.requests_per_engine,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
    )
    return {"autoscaling_config": load}


def address_of(config: ServeConfig) -> str:
    """URL of the service."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}{config.route.rstrip('/')}"


def watch(config: ServeConfig) -> None:
    """Wait until the application is gone: somebody else has stopped it."""
    while config.app in serve.status().applications:
        time.sleep(POLL_S)
    logger.warning("app %r was stopped by somebody else", config.app)


def stop(config: ServeConfig) -> None:
    """Stop the application; requests in work come to their end, up to drain_timeout_s."""
    serve.delete(config.app, _blocking=False)
    patience = time.monotonic() + config.drain_timeout_s + 30.0
    while config.app in serve.status().applications and time.monotonic() < patience:
        time.sleep(POLL_S)


def _run() -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("teacher_serving").setLevel(logging.INFO)
    try:
        return main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(_run())
