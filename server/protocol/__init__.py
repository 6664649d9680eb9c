"""OpenAI's wire types, with their rules: a module for each route."""
