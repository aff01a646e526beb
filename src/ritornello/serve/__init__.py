"""An OpenAI-compatible server: the engine in a thread of its own, FastAPI in front of it."""
