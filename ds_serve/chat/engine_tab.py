"""The Engine tab: what the engine does now as figures and bars, and over the last minutes as plots.

Knows Gradio and HTML; the figures are engine.py's.
"""

from __future__ import annotations

import html
from collections.abc import Callable

import gradio as gr

from ds_serve.chat.engine import INTERVAL_S, SPAN_S, Engine, Sample, rate
from ds_serve.chat.plots import Series, plot


class EngineTab:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def build(self, tabs: gr.Tabs) -> None:
        """Adds the components to the open tab. They change only while it is the one that is looked at."""
        now = gr.HTML(elem_id="engine-now")
        plots = gr.HTML(elem_id="engine-plots")
        timer = gr.Timer(INTERVAL_S, active=False)
        quiet = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        timer.tick(lambda: (self._now(), self._plots()), None, [now, plots], **quiet)
        tabs.select(self._looked_at, None, [timer, now, plots], **quiet)

    def _looked_at(self, event: gr.SelectData) -> tuple[gr.Timer, str, str]:
        return gr.Timer(active=event.value == "Engine"), self._now(), self._plots()

    def _now(self) -> str:
        problem = self._engine.problem
        notice = f'<div class="failure" role="alert">{html.escape(problem)}</div>' if problem else ""
        recent = self._engine.recent()
        if problem or recent is None:
            return notice or '<div class="notice">Two looks are needed first: a second.</div>'
        return f'<div class="tiles">{_tiles(*recent)}</div><div class="bars">{_bars(*recent)}</div>'

    def _plots(self) -> str:
        samples = list(self._engine.samples)
        if len(samples) < 2:
            return ""

        def rates(read: Callable[[Sample], float], scale: float = 1.0) -> list[tuple[float, float]]:
            pairs = zip(samples, samples[1:], strict=False)
            return [(after.at, scale * rate(before, after, read)) for before, after in pairs]

        def values(*key: str, scale: float = 1.0) -> list[tuple[float, float]]:
            return [(sample.at, scale * sample.get(*key)) for sample in samples]

        tokens = [
            Series("out", rates(lambda s: s.get("output_tokens"))),
            Series("in, computed", rates(_computed)),
        ]
        requests = [Series(state, values(f"requests_{state}")) for state in ("running", "waiting")]
        use = [Series(tier, values("kv_usage_ratio", tier, scale=100)) for tier in ("device", "host")]
        stages = [
            Series(f"stage {stage}", rates(lambda s, stage=stage: s.get("stage_busy_seconds", stage), 100))
            for stage in samples[-1].labels("stage_busy_seconds")
        ]
        charts = [
            plot("Tokens a second", tokens, SPAN_S),
            plot("Requests", requests, SPAN_S),
            plot("KV use, %", use, SPAN_S, top=100),
            plot("Stage utilisation, %", stages, SPAN_S, top=100),
        ]
        return f'<div class="plots">{"".join(charts)}</div>'


def _computed(sample: Sample) -> float:
    return sample.get("prompt_tokens") - sample.sum("cached_tokens")


def _tiles(before: Sample, now: Sample) -> str:
    tiles = {
        "running": f"{now.get('requests_running'):,.0f}",
        "waiting": f"{now.get('requests_waiting'):,.0f}",
        "tokens/s": f"{rate(before, now, lambda s: s.get('output_tokens')):,.0f}",
        "cache hit rate": f"{_share(now.sum('cached_tokens'), now.get('prompt_tokens')):.0%}",
        "preemptions": f"{now.get('preemptions'):,.0f}",
    }
    return "".join(
        f'<div class="tile"><b id="now-{_slug(name)}">{value}</b><span>{name}</span></div>'
        for name, value in tiles.items()
    )


def _bars(before: Sample, now: Sample) -> str:
    rows = [_kv_bar(now, tier) for tier in ("device", "host")]
    for stage in now.labels("stage_busy_seconds"):
        busy = rate(before, now, lambda s, stage=stage: s.get("stage_busy_seconds", stage))
        rows.append((f"Stage {stage} busy", min(1.0, busy), ""))
    return "".join(
        f'<div class="bar" id="bar-{_slug(name)}"><span>{name}</span>'
        f'<div class="track"><i style="width:{100 * share:.1f}%"></i></div>'
        f"<span>{share:.1%}{text}</span></div>"
        for name, share, text in rows
    )


def _kv_bar(now: Sample, tier: str) -> tuple[str, float, str]:
    used, free = (now.get("kv_blocks", state, tier) for state in ("used", "free"))
    text = f" of {used + free:,.0f} blocks" if used + free else ", no such tier"
    return f"KV {tier}", now.get("kv_usage_ratio", tier), text


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name.lower())
