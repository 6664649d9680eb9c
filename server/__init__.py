"""Qwen All-in-One: one small Qwen that reads the mood, then answers, behind the OpenAI API."""
