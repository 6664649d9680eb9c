"""What has to happen in the browser itself: the little JavaScript that Gradio has no means for."""

import json
from string import Template

from server.ui.texts import say

# The key lives as long as the tab: in no address, on no disk, not in the server.
RECALL_KEY = "() => sessionStorage.getItem('qwen-api-key') ?? ''"
KEEP_KEY = "(key) => { sessionStorage.setItem('qwen-api-key', key); return []; }"

# Gradio's own sentence for a server that is gone, which it translates into no language.
CONNECTION_LOST = "Connection to the server was lost"

_START = r"""
() => {
  const restarting = navigator.language.startsWith("zh") ? $zh : $en;
  let isKeyAsked = false;
  const look = () => {
    for (const each of document.querySelectorAll("[data-testid=toast-text]")) {
      if (each.textContent.startsWith($lost)) each.textContent = restarting;
    }
    const key = document.querySelector("#api-key input");
    if (key && !isKeyAsked) key.focus();
    isKeyAsked = key !== null;
  };
  new MutationObserver(look).observe(document.body, { childList: true, subtree: true });

  // Of a message only what was said: neither the mood nor the marks that make markup inert.
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
