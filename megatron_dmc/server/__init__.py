"""The OpenAI-compatible HTTP server. It uses only the engine's public interface."""
