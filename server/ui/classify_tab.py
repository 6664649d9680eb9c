"""The components of the classify tab and their event handlers."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from openai import APIError, AuthenticationError

from server.ui.classify import MAX_ROWS, Run, classify_batches, gather_texts, task_of
from server.ui.client import classify, connect, own_url, served_model
from server.ui.explanation import colors_of, sentence_pieces, word_pieces
from server.ui.failures import explain, warn
from server.ui.lines import to_labelled_csv
from server.ui.side_bar import PRIVATE, SideBar
from server.ui.texts import Language, language_of, local, name_of, say, with_names


class ClassifyTab:
    """Texts in, labels out."""

    def __init__(self, tab: gr.Tab, side: SideBar) -> None:
        self._side = side
        self._run = gr.State()
        self._chosen_text = gr.State()
        self._correct_labels = gr.State({})  # by text
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
        # Filled with the server's tasks by `_list_tasks`.
        self._task = gr.Dropdown(["sentiment"], label=local("task"), elem_id="task")
        self._labels = gr.Textbox(label=local("own_labels"), elem_id="own-labels")
        self._instructions = gr.Textbox(label=local("own_instructions"), max_lines=3)
        with gr.Row():
            self._run_button = gr.Button(local("run"), variant="primary", elem_id="run")
            self._stop_button = gr.Button(local("stop"), elem_id="stop")

    def _lay_out_results(self) -> None:
        self._plot = gr.BarPlot(
            x="label",
            y="count",
            x_title=" ",
            y_title=" ",
            height=280,
            y_lim=[0, None],
            y_axis_format="d",
            show_label=False,  # as in the chat tab
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
            self._correct_label = gr.Dropdown(
                [], label=local("correct_label"), elem_id="correct-label"
            )
        self._download = gr.DownloadButton(local("download"), visible=False, elem_id="download")
        self._download_corrected = gr.DownloadButton(
            local("download_corrected"), visible=False, elem_id="download-corrected"
        )

    def _connect(self, tab: gr.Tab) -> None:
        key = self._side.api_key
        gr.on([tab.select, key.submit, key.blur], self._list_tasks, [key], [self._task], **PRIVATE)
        shown = [self._plot, self._note, self._table]
        running = self._run_button.click(
            self._classify,
            [self._pasted, self._file, self._task, self._labels, self._instructions, key],
            [
                *(self._run, self._correct_labels, self._details),
                *(self._download, self._download_corrected, *shown, *self._side.key_outputs),
            ],
            show_progress_on=[self._plot],
            # One run at a time: a single file can have thousands of lines.
            concurrency_limit=1,
            api_visibility="private",
        )
        stopped = self._stop_button.click(None, cancels=[running], api_visibility="private")
        for end in (running, stopped):
            end.then(self._offer, [self._run], [self._download, *shown], **PRIVATE)

        self._table.select(
            self._explain,
            [self._run, self._correct_labels, key],
            [self._chosen_text, self._details, self._sentences, self._words, self._correct_label],
            show_progress_on=[self._words],
            api_visibility="private",
        )
        self._correct_label.input(
            self._correct,
            [self._run, self._chosen_text, self._correct_label, self._correct_labels],
            [self._correct_labels, self._download_corrected, self._note],
            **PRIVATE,
        )

    async def _list_tasks(self, api_key: str, request: gr.Request) -> Any:
        try:
            async with connect(own_url(request), api_key) as client:
                tasks = (await served_model(client)).tasks
                return gr.Dropdown([name for name, labels in tasks.items() if labels])
        except APIError:
            return gr.skip()  # a run shows the error

    async def _classify(
        self,
        pasted: str,
        file: str | None,
        task: str,
        labels: str,
        instructions: str,
        api_key: str,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008  # Gradio reads the default
    ) -> AsyncIterator[dict[Any, Any]]:
        language = language_of(request)
        texts, body = gather_texts(pasted, file), task_of(task, labels, instructions)
        if not texts or body is None:
            warn(say("two_labels" if texts else "no_lines", language), language)
            return
        yield {
            self._run: None,
            self._correct_labels: {},
            self._details: gr.Column(visible=False),
            self._download: gr.DownloadButton(visible=False),
            self._download_corrected: gr.DownloadButton(visible=False),
        }
        progress(0)
        try:
            async with connect(own_url(request), api_key) as client:
                async for run in classify_batches(client, texts, body):
                    progress((len(run.results), len(texts)))
                    if run.is_due:
                        yield {self._run: run, **self._shown(run, request)}
        except APIError as error:
            warn(explain(error, language), language)
            if isinstance(error, AuthenticationError):
                yield self._side.ask_for_key()

    async def _explain(
        self,
        run: Run | None,
        correct_labels: dict[str, str],
        api_key: str,
        chosen: gr.SelectData,
        request: gr.Request,
    ) -> dict[Any, Any]:
        """Shows the chosen row in colours, and its label, which the user may correct."""
        if run is None:
            return {self._chosen_text: None}
        language, text = language_of(request), chosen.row_value[0]
        body = {**run.task, "sentences": True, "explain": True}
        try:
            async with connect(own_url(request), api_key) as client:
                [result] = await classify(client, [text], body)
                labels = (await served_model(client)).tasks.get(run.task.get("task", ""), [])
        except APIError as error:
            warn(explain(error, language), language)
            return {self._chosen_text: None}
        probabilities = with_names(result, labels)["probabilities"]
        label = correct_labels.get(text, run.label_of(text))
        return {
            self._chosen_text: text,
            self._details: gr.Column(visible=True),
            self._sentences: gr.HighlightedText(
                sentence_pieces(text, result, language), color_map=colors_of(result, language)
            ),
            self._words: word_pieces(text, result),
            self._correct_label: gr.Dropdown(
                [(name_of(each, language), each["value"]) for each in probabilities], value=label
            ),
        }

    def _correct(
        self,
        run: Run,
        text: str,
        label: str,
        correct_labels: dict[str, str],
        request: gr.Request,
    ) -> dict[Any, Any]:
        """Saves the label that the user chose for a text, even if it equals the model's."""
        correct_labels = {**correct_labels, text: label}
        path = save_bytes_to_cache(
            to_labelled_csv(correct_labels), "corrected.csv", self._download_corrected.GRADIO_CACHE
        )
        return {
            self._correct_labels: correct_labels,
            self._download_corrected: gr.DownloadButton(value=path, visible=True),
            self._note: self._note_text(run, language_of(request), len(correct_labels)),
        }

    def _note_text(self, run: Run, language: Language, num_corrected: int = 0) -> str:
        done = len(run.results)
        note = say("progress", language).format(done=done, total=len(run.texts))
        if done > MAX_ROWS:
            note += say("shown_first", language).format(shown=MAX_ROWS)
        if num_corrected:
            note += say("corrected", language).format(number=num_corrected)
        return f"{note}\n\n{say('choose_row', language)}"

    def _offer(self, run: Run | None, request: gr.Request) -> dict[Any, Any]:
        """Offers the results for download, whether the run was finished or stopped."""
        if run is None:
            return {self._download: gr.skip()}
        # In Gradio's own folder, which Gradio cleans up.
        path = save_bytes_to_cache(run.csv(), "results.csv", self._download.GRADIO_CACHE)
        return {
            self._download: gr.DownloadButton(value=path, visible=True),
            **self._shown(run, request),
        }

    def _shown(self, run: Run, request: gr.Request) -> dict[Any, Any]:
        language = language_of(request)
        headers = [say(key, language) for key in ("text", "label", "confidence")]
        rows = {"headers": headers, "data": run.rows(language)}
        return {
            self._plot: gr.BarPlot(run.distribution(language), title=say("distribution", language)),
            self._note: self._note_text(run, language),
            self._table: gr.Dataframe(rows, visible=True),
        }
