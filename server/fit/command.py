"""`fit`: reads rows, fits a judge to them, tests it, and writes it if it is better.

Exit codes: 0 written; 1 not written: the judge is not better, or an input cannot be used; 2 unknown
option.
"""

import asyncio
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace

from safetensors import SafetensorError
from tqdm import tqdm

from server.config import read_settings
from server.core.engine.checkpoint import CheckpointError
from server.core.engine.engine import Engine
from server.core.roles.fitting import candidate_layers
from server.core.roles.judges import Judge
from server.core.roles.prompts import TaskPrompts
from server.core.roles.task_files import TaskFileError
from server.fit.errors import FitError
from server.fit.learning import Fitted, Measurements, judgements_of, learn, measure_rows
from server.fit.output import adapter_folder, file_stem, other_tables, write_fitted
from server.fit.report import Report
from server.fit.rows import read_rows
from server.fit.selection import Selection, labelled, renamed, select, task_of
from server.fit.settings import FitSettings
from server.fit.tuning import MAX_VIRTUAL_TOKENS, SoftPrompt, check_tuning, tune
from server.judge_loading import JudgeLoader
from server.loading import Model, check_task, find_model, load_engine, prompts_of
from server.logs import configure_logs
from server.reasons import first_line

# The options that decide which weights a server loads.
IDENTITY = ("model", "revision", "dtype")


def fit(arguments: list[str]) -> None:
    """Runs the command. If nothing is written, exits with a one-sentence error."""
    settings = read_settings(FitSettings, arguments)
    configure_logs("warning", "text")
    try:
        run(settings)
    except (FitError, CheckpointError, TaskFileError) as error:
        sys.exit(f"error: {error}")
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: cannot write to --out {settings.out}: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(1)


def run(settings: FitSettings) -> Report:
    """Reads, fits, prints and writes.

    Raises:
        FitError: the rows or the options cannot be used, or the judge is not better.
        CheckpointError, TaskFileError: as when a server starts.
        OSError, SafetensorError: the folder cannot be written.
    """
    other_tables(settings.out)  # checked first: fitting takes a while
    model = find_model(settings.server)
    prompts, selection = _selected(settings, model)
    if model.checkpoint.warning:
        print(f"WARNING: {model.checkpoint.warning}", file=sys.stderr)
    fitted, soft_prompt, identity = _fitted(settings, model, prompts, selection)
    report = Report(
        prompts.task, model.checkpoint.model_id, model.dtype, settings.rows, selection, fitted
    )
    for line in report.as_lines():
        print(line)
    if not (fitted.comparison.is_gain or settings.force):
        raise FitError("nothing was written: the judge is not better; --force writes it anyway")
    write_fitted(settings.out, prompts, identity, report, soft_prompt)
    print("\n".join(_how_to_serve(settings, soft_prompt is not None)))
    return report


def _selected(settings: FitSettings, model: Model) -> tuple[TaskPrompts, Selection]:
    """The task and the rows, checked before the weights are read."""
    rows, bad_rows = read_rows(
        settings.rows,
        text_column=settings.text_column,
        label_column=settings.label_column,
        encoding=settings.encoding,
    )
    rows, excluded = renamed(rows, settings.labels)
    task = task_of(
        model.task_file.tasks, settings.task, settings.instruction, [each.label for each in rows]
    )
    is_tuned = settings.method == "prompt"
    if is_tuned and task.adapter:
        raise FitError(
            f"the task {task.name!r} uses the adapter {task.adapter!r}, and --method prompt tunes "
            "on the base model; name a task without an adapter"
        )
    room = MAX_VIRTUAL_TOKENS if is_tuned else 0
    prompts = prompts_of(task, replace(model, max_context=model.max_context - room))
    check_task(prompts)
    selection = select(
        labelled(rows, task),
        task,
        lambda text: not prompts.has_room_for(prompts.encode(text)),
        max_rows=settings.max_rows,
        test_share=settings.test_share,
    )
    if is_tuned:
        check_tuning(selection, task, model.checkpoint.path)
    return prompts, replace(selection, left_out=[*bad_rows, *excluded, *selection.left_out])


def _fitted(
    settings: FitSettings, model: Model, prompts: TaskPrompts, selection: Selection
) -> tuple[Fitted, SoftPrompt | None, str]:
    """The fitted judge, its soft prompt if it has one, and the identity of the model."""
    is_tuned = settings.method == "prompt"
    layers = () if is_tuned else candidate_layers(model.config.num_layers)
    engine, cache = load_engine(model, settings.server)
    try:
        judges = JudgeLoader(
            engine, model.tokenizer, cache,
            num_layers=model.config.num_layers, max_context=model.max_context,
            adapters=model.adapters,
        )  # fmt: skip
        judges.load([prompts.task])
        present = judges.judges[prompts.task.version]
        measured = _measured(engine, prompts, selection, present, layers)
    finally:
        engine.close()
    if not is_tuned:
        return learn(prompts.task, present, measured), None, cache.model
    before = judgements_of(prompts.task, present, measured)
    return *tune(model, prompts, selection, before), cache.model


def _measured(
    engine: Engine, prompts: TaskPrompts, selection: Selection, present: Judge,
    layers: tuple[int, ...],
) -> Measurements:  # fmt: skip
    total = len(selection.test)
    if layers:
        total += len(selection.train) + len(prompts.examples[0])
    # disable=None: shown on a terminal only, not in logs.
    with tqdm(total=total, desc="reading rows", leave=False, disable=None) as bar:
        return asyncio.run(measure_rows(engine, prompts, selection, present, layers, bar.update))


def _how_to_serve(settings: FitSettings, has_adapter: bool) -> Iterator[str]:
    stem = file_stem(settings.task)
    adapters = [*settings.adapter]
    if has_adapter:
        adapters.append(f"{stem}={adapter_folder(settings.out, settings.task)}")
    options = [
        *(
            (name, getattr(settings, name))
            for name in IDENTITY
            if name in settings.model_fields_set
        ),
        *(("adapter", pair) for pair in adapters),
        ("tasks", settings.out),
    ]
    words = [word for name, value in options for word in (f"--{name}", str(value))]
    yield f"Written to {settings.out}; the report is {settings.out / f'{stem}-report.html'}."
    yield "Serve it with:"
    yield ""
    yield f"  python -m server {shlex.join(words)}"
