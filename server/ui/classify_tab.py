"""The classify tab: where its components stand, and which event leads to which function."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from openai import APIError, AuthenticationError

from server.ui.classify import MAX_ROWS, Judged, gather_texts, judge, task_of
from server.ui.client import classify, connect, own_url, served_model
from server.ui.explanation import colors_of, sentence_pieces, word_pieces
from server.ui.failures import explain, warn
from server.ui.lines import to_labelled_csv
from server.ui.side_bar import QUIETLY, SideBar
from server.ui.texts import Language, language_of, local, name_of, say, with_names


class ClassifyTab:
    """Texts in, labels out."""

    def __init__(self, tab: gr.Tab, side: SideBar) -> None:
        self._side = side
        self._judged = gr.State()
        self._chosen = gr.State()  # a text
        self._right_labels = gr.State({})  # by text
        with gr.Row():
            with gr.Column():
                self._lay_out_texts()
            with gr.Column():
                self._lay_out_results()
        self._connect(tab)

    def _lay_out_texts(self) -> None:
        self._pasted = gr.Textbox(label=local("lines"), lines=6, max_lines=6, elem_id="lines")
        self._file = gr.File(
            label=local("file"), file_types=[".csv", ".txt"], height=120, elem_id="file"
        )
        # More of them when the server has been asked.
        self._task = gr.Dropdown(["sentiment"], label=local("task"), elem_id="task")
        self._labels = gr.Textbox(label=local("own_labels"), elem_id="own-labels")
        self._instructions = gr.Textbox(label=local("own_instructions"), max_lines=3)
        with gr.Row():
            self._run = gr.Button(local("run"), variant="primary", elem_id="run")
            self._stop = gr.Button(local("stop"), elem_id="stop")

    def _lay_out_results(self) -> None:
        self._plot = gr.BarPlot(
            x="label",
            y="count",
            x_title=" ",
            y_title=" ",
            height=280,
            y_lim=[0, None],
            y_axis_format="d",
            show_label=False,  # as in the other tab
            elem_id="distribution",
            buttons=[],
        )
        self._note = gr.Markdown(elem_id="note")
        self._table = gr.Dataframe(
            datatype="str",
            label=local("results"),
            interactive=False,
            wrap=True,
            max_height=420,
            elem_id="results",
            visible=False,
        )
        with gr.Column(visible=False) as self._details:
            self._sentences = gr.HighlightedText(
                label=local("sentences"), elem_id="sentences", buttons=[]
            )
            self._words = gr.HighlightedText(label=local("words"), elem_id="words", buttons=[])
            self._right = gr.Dropdown([], label=local("right_label"), elem_id="right-label")
        self._download = gr.DownloadButton(local("download"), visible=False, elem_id="download")
        self._download_corrected = gr.DownloadButton(
            local("download_corrected"), visible=False, elem_id="download-corrected"
        )

    def _connect(self, tab: gr.Tab) -> None:
        key = self._side.api_key
        gr.on([tab.select, key.submit, key.blur], self._list_tasks, [key], [self._task], **QUIETLY)
        shown = [self._plot, self._note, self._table]
        running = self._run.click(
            self._classify,
            [self._pasted, self._file, self._task, self._labels, self._instructions, key],
            [
                *(self._judged, self._right_labels, self._details),
                *(self._download, self._download_corrected, *shown, *self._side.asking),
            ],
            show_progress_on=[self._plot],
            # One run at a time: ten thousand lines of one browser are work enough.
            concurrency_limit=1,
            api_visibility="private",
        )
        stopped = self._stop.click(None, cancels=[running], api_visibility="private")
        for end in (running, stopped):
            end.then(self._offer, [self._judged], [self._download, *shown], **QUIETLY)

        self._table.select(
            self._explain,
            [self._judged, self._right_labels, key],
            [self._chosen, self._details, self._sentences, self._words, self._right],
            show_progress_on=[self._words],
            api_visibility="private",
        )
        self._right.input(
            self._correct,
            [self._judged, self._chosen, self._right, self._right_labels],
            [self._right_labels, self._download_corrected, self._note],
            **QUIETLY,
        )

    async def _list_tasks(self, api_key: str, request: gr.Request) -> Any:
        try:
            async with connect(own_url(request), api_key) as client:
                tasks = (await served_model(client)).tasks
                return gr.Dropdown([name for name, labels in tasks.items() if labels])
        except APIError:
            return gr.skip()  # whoever starts a run is told

    async def _classify(
        self,
        pasted: str,
        file: str | None,
        task: str,
        labels: str,
        instructions: str,
        api_key: str,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008  # Gradio finds it there
    ) -> AsyncIterator[dict[Any, Any]]:
        language = language_of(request)
        texts, body = gather_texts(pasted, file), task_of(task, labels, instructions)
        if not texts or body is None:
            warn(say("two_labels" if texts else "no_lines", language), language)
            return
        yield {
            self._judged: None,
            self._right_labels: {},
            self._details: gr.Column(visible=False),
            self._download: gr.DownloadButton(visible=False),
            self._download_corrected: gr.DownloadButton(visible=False),
        }
        progress(0)
        try:
            async with connect(own_url(request), api_key) as client:
                async for judged in judge(client, texts, body):
                    progress((len(judged.results), len(texts)))
                    if judged.is_due:
                        yield {self._judged: judged, **self._shown(judged, request)}
        except APIError as error:
            warn(explain(error, language), language)
            if isinstance(error, AuthenticationError):
                yield self._side.ask_for_key()

    async def _explain(
        self,
        judged: Judged | None,
        right_labels: dict[str, str],
        api_key: str,
        chosen: gr.SelectData,
        request: gr.Request,
    ) -> dict[Any, Any]:
        """The row in colours, and the label it was given, to be corrected."""
        if judged is None:
            return {self._chosen: None}
        language, text = language_of(request), chosen.row_value[0]
        body = {**judged.task, "sentences": True, "explain": True}
        try:
            async with connect(own_url(request), api_key) as client:
                [result] = await classify(client, [text], body)
                labels = (await served_model(client)).tasks.get(judged.task.get("task", ""), [])
        except APIError as error:
            warn(explain(error, language), language)
            return {self._chosen: None}
        probabilities = with_names(result, labels)["probabilities"]
        label = right_labels.get(text, judged.label_of(text))
        return {
            self._chosen: text,
            self._details: gr.Column(visible=True),
            self._sentences: gr.HighlightedText(
                sentence_pieces(text, result, language), color_map=colors_of(result, language)
            ),
            self._words: word_pieces(text, result),
            self._right: gr.Dropdown(
                [(name_of(each, language), each["value"]) for each in probabilities], value=label
            ),
        }

    def _correct(
        self,
        judged: Judged,
        text: str,
        label: str,
        right_labels: dict[str, str],
        request: gr.Request,
    ) -> dict[Any, Any]:
        """Keeps the right label of the chosen text; one that was right already counts as well."""
        right_labels = {**right_labels, text: label}
        path = save_bytes_to_cache(
            to_labelled_csv(right_labels), "corrected.csv", self._download_corrected.GRADIO_CACHE
        )
        return {
            self._right_labels: right_labels,
            self._download_corrected: gr.DownloadButton(value=path, visible=True),
            self._note: self._noted(judged, language_of(request), len(right_labels)),
        }

    def _noted(self, judged: Judged, language: Language, num_corrected: int = 0) -> str:
        done = len(judged.results)
        note = say("progress", language).format(done=done, total=len(judged.texts))
        if done > MAX_ROWS:
            note += say("shown_first", language).format(shown=MAX_ROWS)
        if num_corrected:
            note += say("corrected", language).format(number=num_corrected)
        return f"{note}\n\n{say('choose_row', language)}"

    def _offer(self, judged: Judged | None, request: gr.Request) -> dict[Any, Any]:
        """What a run has come to, wherever it ended, to be taken away."""
        if judged is None:
            return {self._download: gr.skip()}
        # In Gradio's own folder, which it tidies.
        path = save_bytes_to_cache(judged.csv(), "results.csv", self._download.GRADIO_CACHE)
        return {
            self._download: gr.DownloadButton(value=path, visible=True),
            **self._shown(judged, request),
        }

    def _shown(self, judged: Judged, request: gr.Request) -> dict[Any, Any]:
        language = language_of(request)
        headers = [say(key, language) for key in ("text", "label", "confidence")]
        rows = {"headers": headers, "data": judged.rows(language)}
        return {
            self._plot: gr.BarPlot(
                judged.distribution(language), title=say("distribution", language)
            ),
            self._note: self._noted(judged, language),
            self._table: gr.Dataframe(rows, visible=True),
        }
