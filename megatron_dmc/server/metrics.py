"""Prometheus metrics under vLLM's names, with the prefix `megatron_dmc:`."""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from megatron_dmc.engine import EngineStats, RequestStream

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 10, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000)


class Gaps(Collector):
    """A histogram of seconds that is updated for every token: prometheus_client's takes several times as long."""

    def __init__(self, name: str, text: str, labels: dict[str, str]):
        self._name, self._text, self._labels = name, text, labels
        self._counts, self._sum = [0] * (len(_SECONDS) + 1), 0.0

    def observe(self, seconds: float, count: int) -> None:
        """Record the same gap `count` times."""
        self._counts[bisect_left(_SECONDS, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The figures so far."""
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        bounds = (*(floatToGoString(bound) for bound in _SECONDS), "+Inf")
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class Metrics:
    """Metrics of requests, updated with every step, and of the engine, read at each scrape."""

    def __init__(self, model_name: str):
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self.running = self._gauge("num_requests_running", "Running requests.")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting for pages.")
        self.cache_usage = self._gauge("kv_cache_usage_perc", "Fraction of pages in use.")
        self.pages = self._gauge("num_pages_in_use", "Pages in use, over layers and KV heads.")
        self.cr = self._gauge(
            "measured_cr", "Tokens / entries of running and finished requests' caches."
        )
        self.preemptions = self._counter("num_preemptions", "Preempted requests.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up among the cached prefixes."
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found in cached prefixes."
        )
        self._success = Counter(
            "megatron_dmc:request_success", "Finished requests by reason.",
            ["model_name", "finished_reason"], registry=self._registry,
        )  # fmt: skip
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token.", _SECONDS
        )
        self.itl = Gaps(
            "megatron_dmc:inter_token_latency_seconds", "Between two tokens of a request.",
            {"model_name": model_name},
        )  # fmt: skip
        self._registry.register(self.itl)
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean over a request's tokens except the first.",
            _SECONDS,
        )  # fmt: skip
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self.length = self._histogram("request_generation_tokens", "Tokens generated.", _TOKENS)
        self._last_token: dict[int, float] = {}
        self._totals: dict[str, int] = {}

    def observe(self, stream: RequestStream, num_new: int) -> None:
        """Record a change of a request: `num_new` tokens, or its end."""
        now, metrics = time.monotonic(), stream.metrics
        assert metrics is not None
        if num_new and stream.finish_reason not in ("abort", "error"):
            before = self._last_token.get(stream.key)
            if before is None:
                before = metrics.first_token_time or now
                self.ttft.observe(before - metrics.arrival_time)
                num_new -= 1
            if num_new:
                self.itl.observe((now - before) / num_new, num_new)
            self._last_token[stream.key] = now
        if stream.finished:
            self._last_token.pop(stream.key, None)
            self._success.labels(self._model_name, stream.finish_reason).inc()
            self.latency.observe(now - metrics.arrival_time)
            self.prompt_length.observe(len(stream.prompt_token_ids))
            self.length.observe(len(stream.token_ids))
            num_gaps = len(stream.token_ids) - 1
            if metrics.first_token_time is not None and num_gaps > 0:
                self.tpot.observe((now - metrics.first_token_time) / num_gaps)

    def render(self, stats: EngineStats) -> bytes:
        """The text that Prometheus scrapes."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.cache_usage.set(stats.num_pages_in_use / stats.num_pages)
        self.pages.set(stats.num_pages_in_use)
        self.cr.set(1.0 if stats.measured_cr is None else stats.measured_cr)
        for counter, name in (
            (self.preemptions, "num_preemptions"),
            (self.prompt_tokens, "num_prompt_tokens"),
            (self.generation_tokens, "num_generated_tokens"),
            (self.prefix_queries, "num_prefix_queried_tokens"),
            (self.prefix_hits, "num_prefix_hit_tokens"),
        ):
            total = getattr(stats, name)
            counter.inc(total - self._totals.get(name, 0))
            self._totals[name] = total
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"megatron_dmc:{name}", text, ["model_name"], registry=self._registry)
        return gauge.labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"megatron_dmc:{name}", text, ["model_name"], registry=self._registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"megatron_dmc:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model_name)
