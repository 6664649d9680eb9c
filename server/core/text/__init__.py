"""Between text and token ids: chat templates, tools, grammars, choices under way."""
