"""Builds the services from the settings: finds, checks and loads the model."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from server.config import Settings
from server.core.engine.adapters import ONLY_BASE, Adapter
from server.core.engine.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from server.core.engine.engine import Engine
from server.core.engine.generation_config import GenerationDefaults, read_generation_defaults
from server.core.engine.gguf_file import Source, open_source
from server.core.engine.local import LocalEngine
from server.core.engine.model import (
    LoadedAdapter,
    choose_dtype,
    kv_bytes_per_token,
    load_runner,
    read_adapter,
    read_model_config,
    weights_digest,
)
from server.core.engine.model.config import ModelConfig
from server.core.engine.work import Work
from server.core.roles.classifier import Classifier
from server.core.roles.extractor import Extractor
from server.core.roles.judge_cache import JudgeCache
from server.core.roles.prompts import TaskPrompts
from server.core.roles.reply import SENTIMENT, Extract, Replier
from server.core.roles.task_files import (
    REPLY,
    TASK_FILE_NAME,
    TaskFile,
    TaskFileError,
    read_task_file,
)
from server.core.roles.tasks import DEFAULT_LANGUAGE, ExtractTask, ReplyStyle, Task
from server.core.text.completion import Completer
from server.core.text.grammar import GrammarCompiler
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer
from server.core.text.tokenizer_files import read_tokenizer
from server.errors import ContextLengthError, InvalidRequestError
from server.judge_loading import JudgeLoader, PriorLoader
from server.metrics import Metrics
from server.remote.discovery import UpstreamModel, check_tokenizer, discover
from server.remote.engine import RemoteEngine
from server.remote.upstream import Address
from server.services import Services

# Room after the prompt of an extract task, in tokens: for a sentence, and what is found in it.
MIN_EXTRACT_ROOM = 32
# Settings of an engine in this process, without effect on a remote one.
LOCAL_ENGINE_SETTINGS = (
    "dtype", "num_threads", "max_num_batched_tokens", "max_draft_tokens", "max_kv_mib",
    "max_prefix_mib",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A checked checkpoint, and what the settings make of it. Has no weights yet."""

    checkpoint: Checkpoint
    source: Source
    task_file: TaskFile
    config: ModelConfig
    dtype: str
    tokenizer: ChatTokenizer
    defaults: GenerationDefaults
    max_kv_tokens: int
    max_context: int
    loaded_adapters: tuple[LoadedAdapter, ...]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name, including the base model."""
        named = {loaded.adapter.name: loaded.adapter for loaded in self.loaded_adapters}
        return {**ONLY_BASE, **named}

    @property
    def chat_tasks(self) -> list[Task]:
        """The tasks that chats need."""
        tasks = self.task_file.tasks
        return [tasks[SENTIMENT], tasks[self.task_file.reply.cue_task]]


def load_services(settings: Settings) -> Services:
    """Loads everything a server needs, and starts the engine. Blocks until the model is ready.

    Raises:
        CheckpointError: the model cannot be used.
        TaskFileError: the task file cannot be used.
        EngineUnusableError: --engine does not answer, or serves another model.
    """
    if settings.engine is not None:
        return _load_remote(settings, _address(settings, settings.engine))
    if settings.engine_key is not None:
        raise CheckpointError("--engine-key has no effect without --engine; give --engine, too")
    model = find_model(settings)
    engine, cache = load_engine(model, settings)
    try:
        judges = JudgeLoader(
            engine,
            model.tokenizer,
            cache,
            num_layers=model.config.num_layers,
            max_context=model.max_context,
            adapters=model.adapters,
        )
        judges.find(model.task_file.tasks.values())
        judges.load(model.chat_tasks)
    except BaseException:
        engine.close()
        raise
    return assemble(model, settings, engine, judges)


def _load_remote(settings: Settings, address: Address) -> Services:
    """As `load_services`, with another server as the engine.

    Raises:
        EngineUnusableError: the other server does not answer, or serves another model.
    """
    _check_remote_settings(settings)
    served = discover(address)
    model = find_model(settings, served)
    check_tokenizer(address, served, model.tokenizer)
    engine = RemoteEngine(address, served.name, max_num_seqs=settings.max_num_seqs)
    try:
        judges = PriorLoader(engine, model.tokenizer, max_context=model.max_context)
        judges.load(model.chat_tasks)
    except BaseException:
        engine.close()
        raise
    return assemble(model, settings, engine, judges)


def _address(settings: Settings, url: str) -> Address:
    key = settings.engine_key
    return Address(
        url,
        None if key is None else key.get_secret_value(),
        read_timeout_s=settings.request_timeout,
    )


def _check_remote_settings(settings: Settings) -> None:
    """Refuses settings that have no effect with --engine.

    Raises:
        CheckpointError: such a setting is given.
    """
    if settings.adapter:
        raise CheckpointError(
            "--adapter cannot be used with --engine, which computes the base model; leave it out, "
            "and tasks that name one"
        )
    for name in LOCAL_ENGINE_SETTINGS:
        if name in settings.model_fields_set:
            raise CheckpointError(
                f"--{name.replace('_', '-')} has no effect with --engine; set it where the engine "
                "runs, and leave it out here"
            )


def find_model(settings: Settings, served: UpstreamModel | None = None) -> Model:
    """Finds the checkpoint and checks all that can be checked without its weights.

    served: the model of another server, which computes; then no weights are downloaded.

    Raises: as `load_services`.
    """
    # Before a download, so that errors in the task file are reported at once.
    user_file = read_task_file(settings.tasks) if settings.tasks else TaskFile()
    checkpoint = find_checkpoint(settings.model, settings.revision, has_weights=served is None)
    task_file = read_task_file() | _task_file_of(checkpoint) | user_file
    source = open_source(checkpoint.path)
    config = read_model_config(source)
    tokenizer = read_tokenizer(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"only {config.vocab_size}; they are of different checkpoints"
        )
    defaults = read_generation_defaults(source)
    dtype = choose_dtype(settings.dtype, config)
    max_kv_tokens = settings.max_kv_mib * 2**20 // kv_bytes_per_token(config, dtype)
    max_context = min(
        config.max_position_embeddings,
        _local_context(settings, config, max_kv_tokens)
        if served is None
        else _remote_context(settings, served),
    )
    if (cue_task := task_file.reply.cue_task) not in task_file.tasks:
        raise TaskFileError(
            f"the cue_task {cue_task!r} in the table [{REPLY}] is not a task; use one of "
            f"{', '.join(sorted(task_file.tasks))}"
        )
    if max(defaults.eos_token_ids) >= config.vocab_size:
        raise CheckpointError(
            f"{source}: an eos_token_id of {sorted(defaults.eos_token_ids)} is not one of "
            f"the model's {config.vocab_size} tokens"
        )
    adapters = tuple(
        read_adapter(name, folder, config) for name, folder in settings.adapters.items()
    )
    model = Model(
        checkpoint, source, task_file, config, dtype, tokenizer, defaults, max_kv_tokens,
        max_context, adapters,
    )  # fmt: skip
    for adapter in model.adapters.values():
        _check_room(adapter, max_context)
    for task in task_file.tasks.values():
        check_task(prompts_of(task, model))
    for extract_task in task_file.extract_tasks.values():
        _check_extract_task(extract_task, model)
    return model


def _local_context(settings: Settings, config: ModelConfig, max_kv_tokens: int) -> int:
    # By default as long as the model allows, leaving a quarter of the memory to other requests.
    max_context = settings.max_context or max_kv_tokens * 3 // 4
    max_context = min(max_context, config.max_position_embeddings)
    if max_context > max_kv_tokens:
        raise CheckpointError(
            f"a context of {max_context} tokens does not fit --max-kv-mib {settings.max_kv_mib}, "
            f"which holds {max_kv_tokens}; raise it or lower --max-context"
        )
    return max_context


def _remote_context(settings: Settings, served: UpstreamModel) -> int:
    max_context = settings.max_context or served.max_context
    if max_context > served.max_context:
        raise CheckpointError(
            f"--max-context {max_context} is more than the {served.max_context} tokens of the "
            f"engine at {settings.engine}; lower it, or raise the engine's"
        )
    return max_context


def load_engine(model: Model, settings: Settings) -> tuple[Engine, JudgeCache]:
    """Loads the weights and starts the engine; also returns the cache of the weights' judges.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    # On a thread that then ends, and with it OpenMP's worker threads: with more workers than
    # cores, those of the engine would sleep between any two operations, and a step of 48 tokens
    # would take 130 instead of 76 ms (libgomp's throttled spinning).
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as reader:
        digest = reader.submit(weights_digest, model.source)
        runner = loader.submit(
            load_runner,
            model.source,
            model.config,
            dtype=model.dtype,
            vocab_size=model.tokenizer.vocab_size,
            num_threads=settings.num_threads,
            max_kv_tokens=model.max_kv_tokens,
            max_context=model.max_context,
            max_prefix_bytes=settings.max_prefix_mib * 2**20,
            max_draft_tokens=settings.max_draft_tokens,
            adapters=model.loaded_adapters,
        ).result()
        weights = digest.result()
    engine = LocalEngine(
        runner, max_num_seqs=settings.max_num_seqs, max_rows=settings.max_num_batched_tokens
    )
    return engine, JudgeCache(settings.cache_folder, f"{weights} {model.dtype}")


def assemble(
    model: Model, settings: Settings, engine: Engine, loader: JudgeLoader | PriorLoader
) -> Services:
    """The services for a running engine. loader: has loaded the judges of the chat's tasks."""
    tasks, tokenizer, max_context = model.task_file.tasks, model.tokenizer, model.max_context
    grammars = GrammarCompiler(tokenizer, sorted(model.defaults.eos_token_ids))
    metrics = Metrics()
    engine.observe(metrics)  # from now on, so that the fitting of judges is not counted
    classifier = Classifier(
        engine,
        tokenizer,
        max_context=max_context,
        cache_size=settings.sentiment_cache_size,
        judges=loader.judges,
        fitters={task.version: partial(loader.fit, task) for task in tasks.values()},
        adapters=model.adapters,
    )
    extractor = Extractor(
        engine,
        tokenizer,
        grammars,
        eos_token_ids=frozenset(model.defaults.eos_token_ids),
        max_context=max_context,
        cache_size=settings.sentiment_cache_size,
    )
    extract_tasks = model.task_file.extract_tasks
    replier = Replier(
        engine,
        classifier,
        tokenizer,
        tasks=tasks,
        extractors={name: _finder(extractor, task) for name, task in extract_tasks.items()},
        style=_style_of(model.task_file, settings.persona),
        max_context=max_context,
    )
    return Services(
        model_id=model.checkpoint.model_id,
        warning=model.checkpoint.warning,
        created=int(time.time()),
        max_context=max_context,
        tokenizer=tokenizer,
        grammars=grammars,
        defaults=model.defaults,
        tasks=tasks,
        extract_tasks=extract_tasks,
        judges=loader.judges,
        metrics=metrics,
        engine=engine,
        classifier=classifier,
        replier=replier,
        extractor=extractor,
        completer=Completer(engine, tokenizer, max_context=max_context),
        adapters=model.adapters,
    )


def _finder(extractor: Extractor, task: ExtractTask) -> Extract:
    async def find(text: str, work: Work) -> list[str]:
        return list((await extractor.extract(task, text, work=work)).items)

    return find


def _task_file_of(checkpoint: Checkpoint) -> TaskFile:
    """The task file beside the checkpoint's weights; empty if there is none."""
    path = checkpoint.path / TASK_FILE_NAME
    return read_task_file(path) if path.is_file() else TaskFile()


def _style_of(task_file: TaskFile, persona: str | None) -> ReplyStyle:
    style = ReplyStyle() if persona is None else ReplyStyle(persona={DEFAULT_LANGUAGE: persona})
    return task_file.reply | style


def _check_room(adapter: Adapter, max_context: int) -> None:
    # At least a prompt of one token and an answer of one.
    if adapter.num_virtual_tokens + 2 > max_context:
        raise CheckpointError(
            f"the {adapter.num_virtual_tokens} virtual tokens of the adapter {adapter.name!r} "
            f"leave no room in a context of {max_context} tokens; raise --max-context"
        )


def prompts_of(task: Task, model: Model) -> TaskPrompts:
    """The prompts of the task, with the adapter that it names.

    Raises:
        CheckpointError: there is no such adapter.
    """
    if task.adapter not in model.adapters:
        raise CheckpointError(
            f"the task {task.name!r} names the adapter {task.adapter!r}, which this server does "
            f"not have; add --adapter {task.adapter}=FOLDER"
        )
    return TaskPrompts(task, model.tokenizer, model.max_context, model.adapters[task.adapter])


def check_task(prompts: TaskPrompts) -> None:
    """Checks that the task fits the model, which would otherwise fail with the first text.

    Raises:
        CheckpointError: the task cannot be used with the model.
    """
    task = prompts.task
    try:
        prompts.labels(len(prompts.encode("a")))
    except ChatTemplateError as error:
        raise _refused(task, error) from error
    except ContextLengthError as error:
        raise CheckpointError(
            f"the instruction of the task {task.name!r} leaves no room in a context of "
            f"{prompts.max_context} tokens; raise --max-context, or shorten it"
        ) from error
    except InvalidRequestError as error:
        raise CheckpointError(f"the task {task.name!r} cannot be used: {error.message}") from error


def _check_extract_task(task: ExtractTask, model: Model) -> None:
    """As `check_task`, for each language, whose prompts differ."""
    try:
        prompts = [model.tokenizer.encode_chat(task.messages(text)) for text in ("a", "我")]
    except ChatTemplateError as error:
        raise _refused(task, error) from error
    if max(map(len, prompts)) + MIN_EXTRACT_ROOM > model.max_context:
        raise CheckpointError(
            f"the instruction and examples of the task {task.name!r} leave no room for a sentence "
            f"in a context of {model.max_context} tokens; raise --max-context, or shorten them"
        )


def _refused(task: Task | ExtractTask, error: ChatTemplateError) -> CheckpointError:
    return CheckpointError(
        f"the model's chat template refuses the prompt of the task {task.name!r}: {error}"
    )
