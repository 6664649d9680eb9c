"""Between text and token ids: chat templates, tools, grammars, choices in progress."""
