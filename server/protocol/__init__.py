"""OpenAI's wire types and their validation: a module for each route."""
