"""Every text of the page in Chinese and English.

The browser chooses the language of the page itself (gr.I18n); Accept-Language chooses that of
texts which an event adds later.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gradio as gr

Language = Literal["zh", "en"]

TITLE = "Qwen All-in-One"

TEXTS: dict[str, tuple[str, str]] = {
    "chat": ("聊天", "Chat"),
    "classify": ("批量分类", "Classify"),
    "conversations": ("对话", "Conversations"),
    "new_conversation": ("新对话", "New conversation"),
    "settings": ("设置", "Settings"),
    "system_prompt": ("系统提示词", "System prompt"),
    "system_prompt_info": ("留空则使用服务器的人设", "Leave empty to use the server's persona"),
    "own_sampling": ("自定义温度和长度", "Set temperature and length"),
    "temperature": ("温度", "Temperature"),
    "max_tokens": ("最大词元数", "Max tokens"),
    "sentiment": ("先判断情绪", "Detect the mood first"),
    "analyses": ("同时分析", "Also analyse"),
    "api_key": ("API 密钥", "API key"),
    "api_key_info": ("仅保存在此标签页，关闭后清除", "Kept until you close this tab"),
    "message": ("说点什么…", "Say something…"),
    "greeting": ("今天心情怎么样？", "How are you today?"),
    "mood": ("情绪", "Mood"),
    "mood_cached": ("情绪（来自缓存）", "Mood (from the cache)"),
    "mood_turns": ("情绪变化", "Mood by turn"),
    "under_the_hood": ("技术细节", "Under the hood"),
    "ttft": ("首词元延迟", "Time to first token"),
    "speed": ("每秒词元数", "Tokens per second"),
    "cached_tokens": ("命中缓存的词元", "Cached tokens"),
    "lines": ("每行一条文本", "One text per line"),
    "file": ("或拖入 CSV、TXT 文件", "Or drop a CSV or TXT file"),
    "task": ("任务", "Task"),
    "own_labels": ("自定义标签，用逗号分隔", "Your own labels, separated by commas"),
    "own_instructions": ("自定义说明", "Your own instructions"),
    "run": ("开始分类", "Classify"),
    "stop": ("停止", "Stop"),
    "results": ("结果", "Results"),
    "distribution": ("分布", "Distribution"),
    "download": ("下载 CSV", "Download CSV"),
    "choose_row": (
        "点击一行，查看各句和各词的结果，或更正标签。",
        "Click a row to see its sentences and words, or to correct its label.",
    ),
    "sentences": ("各句的标签", "Label of each sentence"),
    "words": (
        "各词对标签的影响（红：支持，蓝：反对）",
        "Effect of each word on the label (red: for, blue: against)",
    ),
    "correct_label": ("正确标签", "Correct label"),
    "download_corrected": ("下载更正后的标签（CSV）", "Download corrected labels (CSV)"),
    "corrected": ("；已更正 {number} 条", "; {number} corrected"),
    "notice": ("请注意", "Please note"),
    "key_needed": (
        "服务器需要 API 密钥，请在侧边栏输入后重试。",
        "The server requires an API key; enter it in the sidebar and try again.",
    ),
    "busy": (
        "服务器正忙，请在 {seconds} 秒后重试。",
        "The server is busy; try again in {seconds} seconds.",
    ),
    "restarting": (
        "服务器正在重启，请稍后重试。",
        "The server is restarting; try again in a moment.",
    ),
    "no_lines": ("没有可分类的文本。", "There is no text to classify."),
    "two_labels": ("请至少给出两个不同的标签。", "Give at least two different labels."),
    "progress": ("已分类 {done} / {total} 条", "{done} of {total} classified"),
    "shown_first": (
        "；表格只显示前 {shown} 条，CSV 包含全部。",
        "; the table shows the first {shown}, the CSV has all.",
    ),
    "text": ("文本", "Text"),
    "label": ("标签", "Label"),
    "confidence": ("置信度", "Confidence"),
}

# Keeps our keys apart from Gradio's: it also translates choices of a list that equal a key.
PREFIX = "qwen_"

_ZH, _EN = ({PREFIX + key: pair[i] for key, pair in TEXTS.items()} for i in range(2))
I18N = gr.I18n(en=_EN, zh=_ZH, **{"zh-CN": _ZH})


def local(key: str) -> Any:
    """The text, which the browser shows in its own language."""
    return I18N(PREFIX + key)


def language_of(request: gr.Request) -> Language:
    """The first language of the browser's Accept-Language."""
    assert request.request is not None
    header = request.request.headers.get("accept-language", "")
    return "zh" if header.lower().startswith("zh") else "en"


def say(key: str, language: Language) -> str:
    """The text in that language."""
    zh, en = TEXTS[key]
    return zh if language == "zh" else en


def name_of(label: Mapping[str, Any], language: Language) -> str:
    """The label as the page shows it, such as `😢 负面`.

    In Chinese this is the label's text, in English its value.
    """
    value = label.get("value") or label["label"]
    name = label.get("text", value) if language == "zh" else value
    return f"{label.get('emoji', '')} {name}".strip()


def with_names(result: dict[str, Any], labels: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The result, each of its probabilities with the text and emoji of its label."""
    by_value = {label["value"]: label for label in labels}
    named = [{**by_value.get(each["value"], {}), **each} for each in result["probabilities"]]
    return {**result, "probabilities": named}
