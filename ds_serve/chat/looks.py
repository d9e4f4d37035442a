"""How the page looks: its theme, its style sheet (looks.css), and how the theme is switched.

Fonts are those of the reader's system: nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_SANS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    secondary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.slate,
    font=_SANS,
    font_mono=_MONO,
).set(body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950")

# Gradio follows the reader's system; what was chosen here is kept in the browser.
SWITCH_THEME = """() => {
  const dark = document.body.classList.toggle("dark");
  localStorage.setItem("ds_serve.theme", dark ? "dark" : "light");
}"""
KEEP_THEME = """() => {
  const theme = localStorage.getItem("ds_serve.theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
}"""

CSS = (Path(__file__).parent / "looks.css").read_text(encoding="utf-8")
