"""The server: an OpenAI-compatible API for interleaved text and pictures, and its page."""
