"""Every text of the page in Chinese and English.

The browser chooses for what stands on the page (gr.I18n), Accept-Language for what comes later.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gradio as gr

Language = Literal["zh", "en"]

TITLE = "Qwen All-in-One"

TEXTS: dict[str, tuple[str, str]] = {
    "chat": ("聊天", "Chat"),
    "classify": ("批量判断", "Classify"),
    "conversations": ("对话", "Conversations"),
    "new_conversation": ("新对话", "New conversation"),
    "settings": ("设置", "Settings"),
    "system_prompt": ("系统提示词", "System prompt"),
    "system_prompt_info": ("留空则用服务器的人设", "Empty: the server's own persona"),
    "own_sampling": ("自己定温度与长度", "Choose temperature and length"),
    "temperature": ("温度", "Temperature"),
    "max_tokens": ("最多词元", "Max tokens"),
    "sentiment": ("先判断情绪", "Judge the mood first"),
    "analyses": ("另外分析", "Analyse as well"),
    "api_key": ("API 密钥", "API key"),
    "api_key_info": ("只留在这个标签页，关闭即忘", "Stays in this tab until you close it"),
    "message": ("说点什么…", "Say something…"),
    "greeting": ("今天心情怎么样？", "How are you today?"),
    "mood": ("情绪", "Mood"),
    "mood_cached": ("情绪（来自缓存）", "Mood (from the cache)"),
    "mood_turns": ("情绪变化", "Mood over the turns"),
    "under_the_hood": ("幕后", "Under the hood"),
    "ttft": ("首词元时间", "Time to first token"),
    "speed": ("每秒词元", "Tokens per second"),
    "cached_tokens": ("缓存的词元", "Cached tokens"),
    "lines": ("每行一条", "One text a line"),
    "file": ("或拖入 CSV / TXT 文件", "Or drop a CSV or TXT file"),
    "task": ("任务", "Task"),
    "own_labels": ("自己的标签，用逗号分隔", "Labels of your own, with commas between"),
    "own_instructions": ("自己的说明", "Instructions of your own"),
    "run": ("开始判断", "Classify"),
    "stop": ("停止", "Stop"),
    "results": ("结果", "Results"),
    "distribution": ("分布", "Distribution"),
    "download": ("下载 CSV", "Download CSV"),
    "choose_row": (
        "点一行，看它的句子和词语，或改正标签。",
        "Choose a row to see its sentences and words, or to correct its label.",
    ),
    "sentences": ("各句的标签", "The label of each sentence"),
    "words": (
        "各词对标签的影响（红：支持，蓝：反对）",
        "What each word does to the label (red: for, blue: against)",
    ),
    "right_label": ("正确的标签", "The right label"),
    "download_corrected": ("下载改正过的标签（CSV）", "Download corrected labels (CSV)"),
    "corrected": ("；已改正 {number} 条", "; {number} corrected"),
    "notice": ("请注意", "Please note"),
    "key_needed": (
        "这台服务器需要 API 密钥，请在侧栏输入后重试。",
        "This server asks for an API key: enter it in the side bar and try again.",
    ),
    "busy": (
        "服务器正忙，请在 {seconds} 秒后重试。",
        "The server is busy; try again in {seconds} seconds.",
    ),
    "restarting": (
        "服务器正在重启，请稍后重试。",
        "The server is restarting; try again in a moment.",
    ),
    "no_lines": ("没有可判断的文本。", "There is no text to classify."),
    "two_labels": ("请至少给出两个不同的标签。", "Give two different labels at least."),
    "progress": ("已判断 {done} / {total} 条", "{done} of {total} judged"),
    "shown_first": (
        "；表格只显示前 {shown} 条，CSV 里是全部。",
        "; the table shows the first {shown}, the CSV has all.",
    ),
    "text": ("文本", "Text"),
    "label": ("标签", "Label"),
    "confidence": ("把握", "Confidence"),
}

# Gradio has texts of its own, and translates even the choices of a list that are named as one.
PREFIX = "qwen_"

_ZH, _EN = ({PREFIX + key: pair[i] for key, pair in TEXTS.items()} for i in range(2))
I18N = gr.I18n(en=_EN, zh=_ZH, **{"zh-CN": _ZH})


def local(key: str) -> Any:
    """The text in the language of the browser that shows it."""
    return I18N(PREFIX + key)


def language_of(request: gr.Request) -> Language:
    """What the browser asks for first."""
    assert request.request is not None
    asked = request.request.headers.get("accept-language", "")
    return "zh" if asked.lower().startswith("zh") else "en"


def say(key: str, language: Language) -> str:
    """The text in that language."""
    zh, en = TEXTS[key]
    return zh if language == "zh" else en


def name_of(label: Mapping[str, Any], language: Language) -> str:
    """A label for people, such as `😢 负面`: its text is Chinese as a rule, its value English."""
    value = label.get("value") or label["label"]
    name = label.get("text", value) if language == "zh" else value
    return f"{label.get('emoji', '')} {name}".strip()


def with_names(result: dict[str, Any], labels: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The judgement, each of its probabilities with the text and emoji of its label."""
    known = {label["value"]: label for label in labels}
    named = [{**known.get(each["value"], {}), **each} for each in result["probabilities"]]
    return {**result, "probabilities": named}
