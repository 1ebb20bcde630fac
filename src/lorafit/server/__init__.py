"""The engine over HTTP, with the API that OpenAI's clients use."""
