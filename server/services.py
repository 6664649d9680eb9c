"""The parts of a running server that routes use."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Engine
from server.core.engine.generation_config import GenerationDefaults
from server.core.roles.classifier import Classifier
from server.core.roles.extractor import Extractor
from server.core.roles.judges import Judge
from server.core.roles.reply import Replier
from server.core.roles.tasks import ExtractTask, Task
from server.core.text.completion import Completer
from server.core.text.grammar import GrammarCompiler
from server.core.text.tokenizer import ChatTokenizer
from server.metrics import Metrics

PLAIN_SUFFIX = ":plain"


@dataclass(frozen=True)
class ServedModel:
    """A model id and what it selects: the base model or an adapter, with or without sentiment."""

    id: str
    adapter: Adapter = BASE
    is_plain: bool = False


@dataclass(frozen=True)
class Services:
    """One model and its two roles."""

    model_id: str
    warning: str | None
    created: int
    max_context: int
    tokenizer: ChatTokenizer
    grammars: GrammarCompiler
    defaults: GenerationDefaults
    tasks: Mapping[str, Task]
    extract_tasks: Mapping[str, ExtractTask]
    judges: Mapping[str, Judge]  # by task version
    metrics: Metrics
    engine: Engine
    classifier: Classifier
    replier: Replier
    extractor: Extractor
    completer: Completer
    adapters: Mapping[str, Adapter]  # by name, including the base model

    @cached_property
    def models(self) -> Mapping[str, ServedModel]:
        """The models that requests may name, by id, the base model first."""
        served = [
            ServedModel(f"{self.model_id}{name}{suffix}", adapter, is_plain=bool(suffix))
            for adapter in self.adapters.values()
            for name in (f":{adapter.name}" if adapter.name else "",)
            for suffix in ("", PLAIN_SUFFIX)
        ]
        return {model.id: model for model in served}
