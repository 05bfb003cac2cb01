"""The demo's page, by Gradio: its controls, and how they reach the engine through the line.

No event's values are read by Gradio's components (`preprocess=False`): `requests` reads them, with
one way of refusing for a browser and for whoever calls the server without one.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio import queueing, routes
from gradio.utils import LRUCache

from mdt_jax.demo import markup, requests
from mdt_jax.demo.defaults import COUNTS, PAINTINGS, SHARES, Start, default_steps
from mdt_jax.demo.engine import Engine, Update
from mdt_jax.demo.guard import OneLine
from mdt_jax.demo.limits import MOST_SEED, picture
from mdt_jax.demo.line import Line
from mdt_jax.demo.requests import ALL_CLASSES, HIDDEN_TIMES, Surroundings
from mdt_jax.diffusion.samplers import SAMPLERS, SINGLE_STEP
from mdt_jax.parallel.command import one_line
from mdt_jax.sampling.images import encode_png

_SESSIONS = 128  # pages and callers of which the server keeps anything


def build_page(engine: Engine, line: Line) -> gr.Blocks:
    """The page.

    Args:
      engine: makes the pictures; its programs are compiled.
      line: lets one request after the other use it.
    """
    return _Page(engine, line).build()


class _Page:
    """Builds the page; its methods are the parts and the events."""

    def __init__(self, engine: Engine, line: Line):
        self._engine, self._line, self._around = engine, line, engine.around
        self._start = Start.of(self._around)

    def build(self) -> gr.Blocks:
        model = self._around.model
        with gr.Blocks(
            title=f"{model.name}: mdt_jax", analytics_enabled=False, fill_width=True
        ) as page:
            gr.HTML(_head(self._around), js_on_load=None)
            with gr.Tabs():
                with gr.Tab("Sample"):
                    self._sample_tab()
                if self._around.channels in (1, 3):
                    with gr.Tab("Inpaint"):
                        self._paint_tab()
                    if model.network.supports_masking:
                        with gr.Tab("Hidden tokens"):
                            self._hidden_tab()
            page.unload(self._leave)
        page.queue(max_size=100, default_concurrency_limit=None, api_open=False)
        # Messages that nobody has fetched, by session: Gradio keeps those of 2,000.
        page._queue.pending_messages_per_session = LRUCache(_SESSIONS)
        return page

    def _sample_tab(self) -> None:
        start, guided = self._start, self._is_guided
        with gr.Row():
            with gr.Column(scale=2):
                label = self._class_control("All classes in turn")
                count = self._count_control(COUNTS, 4)
                sampler, steps = self._sampler_controls(SAMPLERS)
                scale = self._scale_control()
                seed = _seed_control()
                with gr.Accordion("More on the guidance", open=False, visible=guided):
                    power = gr.Slider(
                        0,
                        10,
                        start.power,
                        label="Power",
                        info="0: as strong in all steps; 4: in late steps mostly",
                    )
                    begin = gr.Slider(0, 1, start.low, label="Guided from")
                    end = gr.Slider(
                        0,
                        1,
                        start.high,
                        label="Guided to",
                        info="Parts of the process: 0 is its end, 1 pure noise",
                    )
            go, stop, state, shown = self._outcome("Sample")
        self._connect(
            "sample",
            functools.partial(requests.sample_request, self._around),
            [label, count, sampler, steps, scale, power, begin, end, seed],
            (go, stop, state, shown),
        )

    def _paint_tab(self) -> None:
        share = self._around.model.network.supports_masking
        with gr.Row():
            with gr.Column(scale=2):
                chosen = self._picture_part("paint", paints=True)
                label = self._class_control("No class")
                count = self._count_control(PAINTINGS, 1)
                sampler, steps = self._sampler_controls(tuple(SINGLE_STEP))
                scale = self._scale_control()
                resamples = gr.Slider(
                    1, self._around.limits.resamples, 4, step=1, label="Times each step is taken"
                )
                masked = gr.Slider(
                    0,
                    1,
                    0,
                    step=0.1,
                    label="Share of masked passes",
                    info="Above 0 each number of hidden tokens compiles a program of its own",
                    visible=share,
                )
                seed = _seed_control()
            go, stop, state, shown = self._outcome("Inpaint")
        self._connect(
            "inpaint",
            lambda value, *rest: requests.paint_request(
                self._around, _part_of(value, "picture"), _part_of(value, "mask"), *rest
            ),
            [chosen, label, count, sampler, steps, scale, resamples, masked, seed],
            (go, stop, state, shown),
            script=_taking("paint"),
        )

    def _hidden_tab(self) -> None:
        pictures = self._around.data_pictures
        choices = [("The chosen file", -1)]
        choices += [
            (f"{self._engine.class_name(label)} (picture {index + 1})", index)
            for index, (_, label) in enumerate(pictures)
        ]
        with gr.Row():
            with gr.Column(scale=2):
                gr.HTML(
                    "<p>Noise is added to a real picture, and part of its tokens is hidden from "
                    "the encoder. The side-interpolator and the decoder say what they are: what "
                    "MDT is trained on beside plain denoising.</p>",
                    js_on_load=None,
                )
                of_the_data = gr.Dropdown(
                    choices,
                    value=0 if pictures else -1,
                    label="A picture of the data",
                    visible=bool(pictures),
                )
                chosen = self._picture_part("hide", paints=False)
                label = self._class_control("The picture's own class, or none")
                kept = gr.Radio(
                    [(f"{share:.0%}", share) for share in SHARES],
                    value=0.5,
                    label="Tokens that are kept",
                )
                time = gr.Slider(*HIDDEN_TIMES, 0.5, label="Noise", info="As a part of the process")
                seed = _seed_control()
            go, stop, state, shown = self._outcome("Hide and predict")
        self._connect(
            "hidden",
            lambda value, *rest: requests.hidden_request(
                self._around, _part_of(value, "picture"), *rest
            ),
            [chosen, of_the_data, label, kept, time, seed],
            (go, stop, state, shown),
            script=_taking("hide"),
        )

    def _connect(
        self,
        name: str,
        read: Callable[..., Any],
        inputs: list[Any],
        parts: tuple[gr.Button, gr.Button, gr.HTML, gr.HTML],
        script: str | None = None,
    ) -> None:
        """Lets a tab's buttons begin and cancel its request.

        Args:
          name: of the event, which is also its name in Gradio's API.
          read: the controls' values → a request.
          inputs: the controls.
          parts: the buttons, and where the state and the pictures are shown.
          script: takes values that the controls do not have.
        """
        go, stop, state, shown = parts

        def begin(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
            yield from self._follow(name, read, request, values)

        def cancel(request: gr.Request) -> Any:
            there = self._line.cancel(_owner(request, name))
            return gr.skip() if there else markup.status("Nothing is being made.")

        go.click(
            begin,
            inputs,
            [state, shown],
            preprocess=False,
            show_progress="hidden",
            api_name=name,
            js=script,
        )
        stop.click(
            cancel, None, state, show_progress="hidden", queue=False, api_visibility="private"
        )

    def _follow(
        self, name: str, read: Callable[..., Any], request: gr.Request, values: tuple[Any, ...]
    ) -> Iterator[tuple[Any, Any]]:
        """A request's states and pictures; an error is shown and ends it."""
        try:
            wanted = read(*values)
            job = self._line.submit(lambda: self._engine.updates(wanted), _owner(request, name))
            for update in job.updates():
                yield _shown(update)
        except Exception as failure:
            told = one_line(failure) if isinstance(failure, ValueError) else _unexpected(failure)
            yield markup.error(told), gr.skip()
            raise gr.Error(told, print_exception=False) from None

    def _leave(self, request: gr.Request) -> None:
        """Cancels what a closed page has asked for."""
        for name in ("sample", "inpaint", "hidden"):
            self._line.cancel(_owner(request, name))

    @property
    def _is_guided(self) -> bool:
        network = self._around.model.network
        return bool(network.num_classes and network.null_class)

    def _class_control(self, none: str) -> gr.Dropdown:
        network, names = self._around.model.network, self._around.model.class_names
        count = network.num_classes
        named = [names[i] if names else f"class {i}" for i in range(count)]
        distinct = [name if name == str(i) else f"{i}: {name}" for i, name in enumerate(named)]
        return gr.Dropdown(
            [(none, ALL_CLASSES), *zip(distinct, range(count), strict=True)],
            value=ALL_CLASSES,
            label="Class",
            info="Type to search by name or number",
            filterable=True,
            visible=count > 0,
        )

    def _count_control(self, counts: tuple[int, ...], value: int) -> gr.Radio:
        offered = [n for n in counts if n <= self._around.limits.pictures]
        return gr.Radio(offered, value=min(value, offered[-1]), label="Number of pictures")

    def _sampler_controls(self, known: tuple[str, ...]) -> tuple[gr.Dropdown, gr.Number]:
        chosen = self._start.sampler if self._start.sampler in known else known[0]
        with gr.Row():
            sampler = gr.Dropdown(list(known), value=chosen, label="Sampler", min_width=100)
            steps = gr.Number(
                default_steps(self._around, chosen),
                precision=0,
                minimum=1,
                maximum=self._around.limits.steps,
                label="Steps",
                min_width=100,
            )
        sampler.change(
            functools.partial(default_steps, self._around),
            sampler,
            steps,
            preprocess=False,
            queue=False,
            api_visibility="private",
        )
        return sampler, steps

    def _scale_control(self) -> gr.Slider:
        return gr.Slider(
            1,
            10,
            self._start.scale,
            label="Guidance scale",
            info="1: none; higher: nearer to the class, less varied",
            visible=self._is_guided,
        )

    def _picture_part(self, part: str, paints: bool) -> gr.HTML:
        around = self._around

        def prepare(value: Any) -> dict[str, str]:
            try:
                pixels = picture(value, around.limits, around.side, around.channels)
            except ValueError as failure:
                return {"error": one_line(failure)}
            return {"picture": markup.data_url(encode_png(pixels, {}))}

        return gr.HTML(
            html_template=markup.picture_part(part, around.side, paints),
            js_on_load=markup.script(),
            server_functions=[prepare],
            part=part,
            side=around.side,
            paints=paints,
            most_bytes=around.limits.picture_bytes,
        )

    def _outcome(self, action: str) -> tuple[gr.Button, gr.Button, gr.HTML, gr.HTML]:
        with gr.Column(scale=3):
            with gr.Row():
                go = gr.Button(action, variant="primary")
                stop = gr.Button("Cancel")
            state = gr.HTML(markup.status("Ready."), js_on_load=None)
            shown = gr.HTML(markup.empty(), js_on_load=None)
        return go, stop, state, shown


def launch(page: gr.Blocks, host: str, port: int, middleware: list[Any]) -> str:
    """Serves the page in a thread of its own; returns its address."""
    queueing.traceback = routes.traceback = OneLine
    fonts = ["system-ui", "sans-serif"]
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        inbrowser=False,
        prevent_thread_lock=True,
        show_error=True,
        max_file_size="1kb",  # pictures come another way
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        state_session_capacity=_SESSIONS,
        app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
        theme=gr.themes.Default(
            primary_hue="violet", font=fonts, font_mono=["ui-monospace", "monospace"]
        ).set(
            # Gradio's own greys are too pale to read.
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_300",
            block_label_text_color="*neutral_800",
            block_title_text_color="*neutral_800",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
        ),
        css=markup.style(),
        favicon_path=None,
    )
    return address


def _seed_control() -> gr.Number:
    return gr.Number(0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed")


def _shown(update: Any) -> tuple[Any, Any]:
    """The state and the pictures of an update of the line, where they change."""
    if not isinstance(update, Update):
        before = "1 request is" if update == 1 else f"{update} requests are"
        return markup.status(f"Waiting: {before} before yours."), gr.skip()
    if update.result is not None:
        count = len(update.result)
        return markup.status(f"Ready. {count} picture{'s' * (count > 1)} below."), markup.results(
            update.result
        )
    pictures = gr.skip() if update.previews is None else markup.previews(update.previews)
    return markup.progress(update), pictures


def _owner(request: gr.Request, name: str) -> str:
    """Whose a request is: a page's, and of that a tab's."""
    return f"{request.session_hash or uuid.uuid4().hex} {name}"


def _part_of(value: Any, name: str) -> Any:
    """A value of the part where pictures are chosen, which may be anything."""
    return value.get(name) if isinstance(value, dict) else None


def _taking(part: str) -> str:
    """A script that takes a chosen picture's state in place of the first control's value."""
    return f"(first, ...rest) => [window.mdtPictures[{part!r}], ...rest]"


def _unexpected(failure: Exception) -> str:
    return f"the server failed: {one_line(failure)[:200]}"


def _head(around: Surroundings) -> str:
    model = around.model
    trained = f", {model.step:,} steps trained" if model.step else ""
    return (
        f'<div class="mdt-head"><h1>{markup.escaped(model.name)}{trained}</h1>'
        "<p>Every picture made here is <strong>synthetic</strong>: a diffusion model draws it from "
        "noise. A seed gives the same picture again, here and from "
        "<code>python -m mdt_jax.sample</code>.</p></div>"
    )
