"""Metrics of a server, for Prometheus. Where vLLM has a metric it keeps vLLM's name, so that dashboards and Kubernetes'
endpoint picker can read it; further ones count requests and tokens by adapter."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from lorafit.errors import CancelledError, LorafitError
from lorafit.serving import Engine, Result

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)


class Metrics:
    """The metrics of one server. In all methods `adapter` is a name without a version, or the base's name."""

    def __init__(self, base: str):
        self._base = base
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)

        self._first = histogram("vllm:time_to_first_token_seconds", "From the request to the first token.", SECONDS)
        self._between = histogram("vllm:inter_token_latency_seconds", "Mean time between tokens, by answer.", BETWEEN)
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From the request to the end of the answer.", SECONDS
        )
        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = counter("vllm:generation_tokens", "Tokens of answers.")
        self._success = counter("vllm:request_success", "Answers, by how they ended.", "finished_reason")
        self._answers = counter("lorafit:requests", "Answers, by adapter.", "adapter")
        self._tokens = counter("lorafit:tokens", "Tokens of prompts and answers, by adapter.", "adapter")
        self._routed = counter("lorafit:routed_requests", "Requests to the router, by the chosen adapter.", "adapter")
        self._refused = counter("lorafit:refused_requests", "Requests that were refused, by HTTP status.", "status")

    def watch(self, engine: Engine) -> None:
        """Add gauges of what the engine is doing."""
        self.registry.register(_Engine(engine, self._base))

    def answered(self, result: Result, adapter: str) -> None:
        base, tokens = self._base, len(result.tokens)
        self._first.labels(base).observe(result.first)
        if tokens > 1:
            self._between.labels(base).observe((result.seconds - result.first) / (tokens - 1))
        self._whole.labels(base).observe(result.seconds)
        self._prompt.labels(base).inc(result.prompt_tokens)
        self._generated.labels(base).inc(tokens)
        self._success.labels(base, "abort" if result.finish == "cancelled" else result.finish).inc()
        self._answers.labels(base, adapter).inc()
        self._tokens.labels(base, adapter).inc(result.prompt_tokens + tokens)

    def broken_off(self, why: LorafitError, adapter: str) -> None:
        """Count an answer that failed, or was cancelled before its first token."""
        self._success.labels(self._base, "abort" if isinstance(why, CancelledError) else "error").inc()
        self._answers.labels(self._base, adapter).inc()

    def labelled(self, adapter: str, texts: int, tokens: int, seconds: float) -> None:
        """Count the texts of a request for labels, and their tokens."""
        self._whole.labels(self._base).observe(seconds)
        self._prompt.labels(self._base).inc(tokens)
        self._success.labels(self._base, "stop").inc()
        self._answers.labels(self._base, adapter).inc(texts)
        self._tokens.labels(self._base, adapter).inc(tokens)

    def routed(self, adapter: str) -> None:
        self._routed.labels(self._base, adapter).inc()

    def refused(self, status: int) -> None:
        self._refused.labels(self._base, str(status)).inc()

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    def __init__(self, engine: Engine, base: str):
        self._engine, self._base = engine, base

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that are being answered.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Used share of the cache of keys and values.", stats.slots_used),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._base], value)
            yield gauge
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with running and with waiting requests; unix time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = (",".join(sorted(names)) for names in (stats.answering, stats.queued))
        info.add_metric([str(self._engine.slots), running, waiting], time.time())
        yield info
