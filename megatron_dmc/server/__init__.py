"""The OpenAI-compatible HTTP server. Knows the engine's public interface only."""
