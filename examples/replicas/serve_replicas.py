"""Several engines behind one OpenAI-compatible endpoint: data parallelism with Ray Serve.

    pip install 'megatron-dmc[serve,ray]'
    python examples/replicas/serve_replicas.py MODEL --replicas 2 --gpus-per-replica 1 --port 8000

Every replica is a whole server of ours (the application of `megatron-dmc serve`, with its flags) in a
process of its own; with `--tensor-parallel-size N` it starts N - 1 more, so give it N GPUs. Ray Serve
chooses a replica for every request (of two, the one with fewer in progress), restarts a replica that
ends or whose engine has failed, and sends it nothing meanwhile. On a Ray cluster
(`--address auto`) the replicas spread over its machines; without one Ray is started here.

`/metrics`, `/live` and the page at `/` are those of any one replica; the header `x-replica` of every answer
says whose. For Prometheus, scrape Ray's own figures, or run `megatron-dmc serve` processes behind a proxy.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence

import ray
from ray import serve

from megatron_dmc.cli.serve import add_arguments, check_arguments, make_app
from megatron_dmc.errors import DMCError, EngineDead

REPLICA_HEADER = "x-replica"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of `megatron-dmc serve` and of this program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    group = parser.add_argument_group("replicas")
    group.add_argument("--replicas", type=int, default=2, metavar="N", help="engines")
    group.add_argument("--gpus-per-replica", type=float, default=0, help="0: on the CPU")
    group.add_argument("--cpus-per-replica", type=float, default=1)
    group.add_argument("--address", help="Ray cluster to use ('auto': the one of this machine)")
    return parser.parse_args(argv)


def application(args: argparse.Namespace) -> serve.Application:
    """The deployment of all replicas."""

    def build():
        """In the replica's process: load the model and make the application."""
        from megatron_dmc.quiet import silence_optional_packages

        silence_optional_packages()
        app, service = make_app(args)
        app.state.llm = service.llm
        name = f"{serve.get_replica_context().replica_id.unique_id}/{os.getpid()}"

        @app.middleware("http")
        async def say_who(request, call_next):
            response = await call_next(request)
            response.headers[REPLICA_HEADER] = name
            return response

        return app

    @serve.deployment(
        name="megatron-dmc",
        num_replicas=args.replicas,
        # the engine batches: its own limit (--max-concurrent-requests) is the one that counts
        max_ongoing_requests=2 * args.max_concurrent_requests,
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=args.shutdown_timeout,
    )
    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Ray Serve replaces a replica whose engine has failed."""
            failure = self.app.state.llm.failure
            if failure is not None:
                raise EngineDead(str(failure))

    return Replica.bind()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        check_arguments(args)
        if args.replicas < 1:
            raise DMCError(f"--replicas {args.replicas}: use 1 or more")
        if args.gpus_per_replica == 0 and args.device is None:
            args.device = "cpu"
    except DMCError as e:
        print(f"serve_replicas.py: error: {e}", file=sys.stderr)
        return 2
    here = {"num_cpus": args.replicas * args.cpus_per_replica, "include_dashboard": False}
    ray.init(address=args.address, **({} if args.address else here), configure_logging=False)
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(application(args), name="megatron-dmc", route_prefix="/")
    print(
        f"serving {args.replicas} replicas at http://{args.host}:{args.port}",
        file=sys.stderr,
        flush=True,
    )
    done.wait()
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
