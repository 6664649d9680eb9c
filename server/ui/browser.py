"""The page's JavaScript: what Gradio's components cannot do."""

import json
from string import Template

from server.ui.texts import say

# The key is kept as long as the tab: in no URL, on no disk, not in the server.
RECALL_KEY = "() => sessionStorage.getItem('qwen-api-key') ?? ''"
KEEP_KEY = "(key) => { sessionStorage.setItem('qwen-api-key', key); return []; }"

# Gradio's message when the server is gone. Gradio does not translate it.
CONNECTION_LOST = "Connection to the server was lost"

_START = r"""
() => {
  const restarting = navigator.language.startsWith("zh") ? $zh : $en;
  let isKeyShown = false;
  const update = () => {
    for (const each of document.querySelectorAll("[data-testid=toast-text]")) {
      if (each.textContent.startsWith($lost)) each.textContent = restarting;
    }
    const key = document.querySelector("#api-key input");
    if (key && !isKeyShown) key.focus();
    isKeyShown = key !== null;
  };
  new MutationObserver(update).observe(document.body, { childList: true, subtree: true });

  // Removes the mood from a copied message, and the characters that make its markup inert.
  const clean = (text) => text.replace(/\n?\u2063.*/g, "").replaceAll("\u2060", "");
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(clean(text));
  }
  document.addEventListener("copy", (event) => {
    const text = getSelection().toString();
    if (clean(text) === text) return;
    event.clipboardData.setData("text/plain", clean(text));
    event.preventDefault();
  });
}
"""
ON_START = Template(_START).substitute(
    lost=json.dumps(CONNECTION_LOST),
    zh=json.dumps(say("restarting", "zh")),
    en=json.dumps(say("restarting", "en")),
)
